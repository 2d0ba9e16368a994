"""SentencePiece vocabularies in GGUF files: llama.cpp's tokens for any text."""

import random
from functools import cache

import pytest
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM

from tests.base.gguf_models import COMMON, CONFIGS, write_gguf
from tests.tiny import TEXT
from xfactor_peft.base.gguf_tokenizer import open_gguf, tokenizer_of
from xfactor_peft.errors import XFactorError

pytest.importorskip("gguf", reason="the extra gguf is not installed")
SPACE = "\u2581"
RUNS = (*range(2, 15), 16)
"""Of spaces, as Llama's and Mistral's vocabularies have them: with one score, and with a gap."""
MARKS = ["  ", "   ", "\n\n", "\n\n\n", "<start_of_turn>"]
"""As Gemma's has them: found in the text as it is."""


@cache
def vocabulary():
    """(token, score, type) of every token: trained merges, in their order as sentencepiece scores them."""
    bpe = Tokenizer(BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    bpe.train_from_iterator([TEXT.replace(" ", SPACE)] * 2, trainer)  # one long word: pieces across spaces too
    made = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    trained = [token for token, _ in made if set(token) != {SPACE} or len(token) == 1]
    found = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
    found += [(SPACE * length, -1e9, 1) for length in RUNS]
    found += [(token, -float(rank), 1) for rank, token in enumerate(trained)]
    return found + [(mark, -1000.0, 4) for mark in MARKS]


def written(path, entries, prefix=True, **more):
    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([token for token, _, _ in entries])
        writer.add_token_scores([score for _, score, _ in entries])
        writer.add_token_types([kind for _, _, kind in entries])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)
        for name, value in more.items():
            writer.add_string(name.replace("_", "."), value)

    config = type(CONFIGS["qwen2"])(**{**COMMON, "vocab_size": len(entries), "head_dim": 16}, num_hidden_layers=1)
    return write_gguf(path, AutoModelForCausalLM.from_config(config), vocabulary=add)


def texts():
    dice, tokens = random.Random(0), [token.replace(SPACE, " ") for token, _, kind in vocabulary() if kind in (1, 4)]
    for count in range(150):
        yield "".join(dice.choices(tokens, k=dice.randrange(1, 30)))
        yield "".join(dice.choices(" ab-xX1\n\t.\u00e9\u6f22\U0001f600", k=dice.randrange(1, 40)))
        yield dice.choice([" ", "ab", "ex", "\n", " X", "ana"]) * (1 + count % 40)
        yield "".join(dice.choices([*MARKS, "<s>", "</s>", "<unk>", "x", " the", " "], k=dice.randrange(1, 9)))
    yield from (TEXT, "", " ", "<0x0A>", "\x00\x01", "\ud7ff\ue000", SPACE, f" {SPACE} ")


@pytest.mark.parametrize("prefix", [True, False])
def test_the_tokens_are_llama_cpps(prefix, tmp_path):
    """Over odd texts: pieces in any order, runs, bytes, marks; and back to the text."""
    from tests.export.llama import LlamaCpp

    path = written(tmp_path / "x.gguf", vocabulary(), prefix)
    tokenizer, program = tokenizer_of(open_gguf(path)), LlamaCpp(path, len(vocabulary()))
    for text in texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == program.tokens(text), repr(text)
        marks = ("<s>", "</s>", "<unk>", *MARKS) if prefix else ()
        if not any(mark in text for mark in (*marks, SPACE)):  # a space is put behind marks, here and there
            assert tokenizer.decode(ids) == text
    assert tokenizer("x")["input_ids"][0] == 1


def without(entries, token):
    return [entry for entry in entries if entry[0] != token]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: without(found, "<0x0A>"), "<0x0A> is missing"),
        (lambda found: [(t, 0.0 if k == 1 else s, k) for t, s, k in found], "have one score"),
        (lambda found: [(t, float("nan"), k) for t, s, k in found], "scores do not fit"),
    ],
)
def test_what_is_not_llama_cpps_for_certain_is_refused(change, message, tmp_path):
    with pytest.raises(XFactorError, match=message):
        tokenizer_of(open_gguf(written(tmp_path / "x.gguf", change(vocabulary()))))


def test_phis_marks_are_refused(tmp_path):
    path = written(tmp_path / "x.gguf", vocabulary(), general_name="Phi 3 mini")
    with pytest.raises(XFactorError, match="Phi's files"):
        tokenizer_of(open_gguf(path))
