"""A ban is a proof, and the proof can fail."""

import numpy as np
import pytest
import regex
import torch

from tests.tokens.test_patterns import demo_tokenizer, llama_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.phrases.ban import ban, prove
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import Pattern

HAN = (Pattern("Han", "script"),)


@pytest.fixture(scope="module", params=[demo_tokenizer, llama_tokenizer])
def tokenizer(request):
    return request.param()


def test_no_sequence_of_the_tokens_left_has_a_banned_character(tokenizer):
    proof = ban(tokenizer, HAN, len(tokenizer))
    automaton = TokenAutomaton(tokenizer, HAN, len(tokenizer))
    left = np.setdiff1d(np.array(list(automaton.bytes)), proof.banned)
    # the hardest texts: nothing but pieces of characters
    pieces = [i for i in left if any(byte > 127 for byte in automaton.bytes[int(i)])]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(pieces)[torch.randint(len(pieces), (50_000,), generator=generator)].tolist()
    text = b"".join(automaton.bytes[i] for i in drawn).decode("utf-8", "replace")
    assert not regex.search(r"\p{Han}", text)
    assert proof.states > 1
    assert len(left) > 0.5 * len(automaton.bytes)


def test_a_ban_of_whole_characters_alone_is_not_enough(tokenizer):
    automaton = TokenAutomaton(tokenizer, HAN, len(tokenizer))
    whole = [i for i, raw in automaton.bytes.items() if regex.search(r"\p{Han}", raw.decode("utf-8", "ignore"))]
    with pytest.raises(XFactorError, match="can spell script Han"):
        prove(automaton, np.array(whole, dtype=np.int64))


def test_phrases_have_no_such_proof(tokenizer):
    with pytest.raises(XFactorError, match="only characters and scripts"):
        ban(tokenizer, (Pattern("king"),), len(tokenizer))
