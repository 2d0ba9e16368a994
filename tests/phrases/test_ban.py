"""A ban is a proof, and the proof can fail."""

import numpy as np
import pytest
import regex
import torch
from transformers import AddedToken

from tests.tokens.test_patterns import demo_tokenizer, llama_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.phrases.ban import ban, characters, prove
from xfactor_peft.tokens.patterns import Pattern
from xfactor_peft.tokens.token_bytes import token_bytes

HAN = (Pattern("Han", "script"),)


@pytest.fixture(scope="module", params=[demo_tokenizer, llama_tokenizer])
def tokenizer(request):
    return request.param()


def test_no_sequence_of_the_tokens_left_has_a_banned_character(tokenizer):
    proof, texts = ban(tokenizer, HAN, len(tokenizer)), token_bytes(tokenizer)
    left = np.setdiff1d(np.array(list(texts)), proof.banned)
    # the hardest texts: nothing but pieces of characters
    pieces = [i for i in left if any(byte > 127 for byte in texts[int(i)])]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(pieces)[torch.randint(len(pieces), (50_000,), generator=generator)].tolist()
    text = b"".join(texts[i] for i in drawn).decode("utf-8", "replace")
    assert not regex.search(r"\p{Han}", text)
    assert proof.checked == len(left) > 0.5 * len(texts)


def test_a_marker_that_can_be_drawn_is_text():
    tokenizer = demo_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    marker = tokenizer.convert_tokens_to_ids("<tool>")
    assert marker in ban(tokenizer, (Pattern("<", "char"),), len(tokenizer)).banned
    assert marker not in ban(tokenizer, (Pattern("é", "char"),), len(tokenizer)).banned


def test_a_ban_of_whole_characters_alone_is_not_enough(tokenizer):
    texts = token_bytes(tokenizer)
    whole = [i for i, raw in texts.items() if regex.search(r"\p{Han}", raw.decode("utf-8", "ignore"))]
    with pytest.raises(XFactorError, match="the tokens that are left can spell '"):
        prove(texts, np.array(whole, dtype=np.int64), characters(HAN))


def test_a_token_goes_only_for_what_it_holds_or_begins(tokenizer):
    """What every token means, character by character, for an alphabet of two-byte characters."""
    cyrillic, texts = (Pattern("Cyrillic", "script"),), token_bytes(tokenizer)
    banned = set(ban(tokenizer, cyrillic, len(tokenizer)).banned.tolist())
    leads = {chr(c).encode()[:1] for c in range(0x400, 0x530)}
    for i, raw in texts.items():
        held = regex.search(r"\p{Cyrillic}", raw.decode("utf-8", "ignore")) is not None
        if held or raw[-1:] in leads:
            assert i in banned
        elif raw.isascii():
            assert i not in banned


def test_phrases_and_the_sign_for_broken_bytes_have_no_such_proof(tokenizer):
    with pytest.raises(XFactorError, match="only characters and scripts"):
        ban(tokenizer, (Pattern("king"),), len(tokenizer))
    with pytest.raises(XFactorError, match="cannot be banned"):
        ban(tokenizer, (Pattern("\ufffd", "char"),), len(tokenizer))
