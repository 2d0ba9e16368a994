"""What a vocabulary's entries stand for comes from the tokenizer's own decoder, for every kind of it."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import xfactor_peft
from tests.tiny import tiny_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.tokens.spelling import spelling
from xfactor_peft.tokens.token_bytes import markers, spelling_text, token_bytes, token_texts
from xfactor_peft.tokens.token_set import TokenSet

LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def made(entries, decoder, added=(), **special):
    vocabulary = {token: i for i, token in enumerate(["<unk>", *entries])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def texts(tokenizer):
    return list(token_texts(tokenizer).values())


CASES = {
    "GPT-1": (decoders.BPEDecoder(), ["the</w>", "th", "/", "//</w>"], ["the ", "th", "/", "// "], "</w>"),
    "another suffix": (decoders.BPEDecoder(suffix="@"), ["the@", "th"], ["the ", "th"], "@ for a word's end"),
    "WordPiece": (decoders.WordPiece(), ["the", "##ing", "#", "n't"], [" the", "ing", " #", "n't"], "## for a word"),
    "another prefix": (decoders.WordPiece(prefix="__"), ["the", "__ing", "##s"], [" the", "ing", " ##s"], "__"),
    "Metaspace": (decoders.Metaspace(), ["▁the", "▁▁▁", "<0x0A>"], [" the", "   ", "<0x0A>"], "▁ for a space"),
    "Llama": (LLAMA, ["<0x0A>", "▁the", "<0xE2>", "▁▁▁"], ["\n", " the", "\udce2", "   "], "<0xNN> for a byte"),
    "byte-level": (decoders.ByteLevel(), ["Ġthe", "▁the", "</w>"], [" the", "▁the", "</w>"], "byte-level"),
    "no decoder": (None, ["the", "▁the"], [" the", " ▁the"], "whole words"),
    "pattern": (
        decoders.Sequence([decoders.Replace(Regex("_+"), " ")]), ["__a", "b"], [" a", "b"], "_+"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_token_is_what_its_decoder_says(name):
    decoder, entries, expected, words = CASES[name]
    tokenizer = made(entries, decoder)
    assert texts(tokenizer) == expected
    assert words in spelling_text(tokenizer)


@pytest.mark.parametrize("name", [name for name in CASES if name != "no decoder"])
def test_tokens_amid_a_text_join_to_what_the_decoder_writes(name):
    """The middle of a text, whose ends decoders treat otherwise."""
    decoder, entries, _, _ = CASES[name]
    raw = token_bytes(made(entries, decoder))
    middle = b"".join(raw.values()).decode("utf-8", errors="replace")
    whole = re.sub("\ufffd+", "\ufffd", decoder.decode(["x", *entries, "x"]))  # one, or one for every byte of a run
    assert middle in whole


def test_sets_of_gpt1_and_wordpiece_leave_their_marks_out():
    gpt1 = made(["the</w>", "a/b", "w"], decoders.BPEDecoder())
    assert TokenSet.contains(gpt1, "/").texts == ("a/b",)
    assert TokenSet.contains(gpt1, "w").texts == ("w",)
    assert TokenSet.words(gpt1, ["the"]).texts == ("the ",)
    assert TokenSet.regex(gpt1, "^the $").texts == ("the ",)
    bert = made(["the", "##the", "#1"], decoders.WordPiece())
    assert TokenSet.contains(bert, "#").texts == (" #1",)
    assert TokenSet.words(bert, ["the"]).texts == (" the", "the")


def test_an_unknown_decoder_is_refused_by_name():
    with pytest.raises(XFactorError, match="decoder CTC is not known"):
        TokenSet.contains(made(["a"], decoders.CTC()), "a")
    with pytest.raises(XFactorError, match="decoder CTC is not known"):
        spelling(made(["a"], decoders.Sequence([decoders.Fuse(), decoders.CTC()])))


def test_added_tokens_are_markers_or_text():
    """In brackets: a role. Otherwise what a text may hold: runs of spaces (GPT-NeoX, Gemma), words that were added."""
    added = ["<|fim_suffix|>", "<unused0>", "[TOOL]", "▁▁▁▁", "<0x58>", "fix</w>", "Ünder"]
    tokenizer = made(["▁x", "f"], LLAMA, added)
    assert list(markers(tokenizer).values()) == ["<|fim_suffix|>", "<unused0>", "[TOOL]"]
    assert texts(tokenizer) == [" x", "f", "    ", "X", "fix</w>", "Ünder"]
    assert TokenSet.contains(tokenizer, "x").texts == (" x", "fix</w>")
    assert "3 markers (<|fim_suffix|>, <unused0>, [TOOL])" in spelling_text(tokenizer)
    byte_level = tiny_tokenizer()
    byte_level.add_tokens(["é!", "<|fim|>"])
    assert texts(byte_level)[-1] == "é!"  # looked for as it is, not through the alphabet of bytes
    chosen = next(iter(markers(byte_level)))
    assert TokenSet.token_ids(byte_level, [chosen]).texts == ("<|fim|>",)  # who names it by its id gets it


def test_padding_that_is_an_ordinary_word_stays_text():
    tokenizer = made(["a", "!"], decoders.ByteLevel(), pad_token="!")
    assert TokenSet.contains(tokenizer, "!").texts == ("!",)
    both = made(["a", "!"], decoders.ByteLevel(), pad_token="!", eos_token="!")
    with pytest.raises(XFactorError, match="no token matches"):
        TokenSet.contains(both, "!")
    named = made(["a", "<pad>"], decoders.ByteLevel(), pad_token="<pad>")
    assert texts(named) == ["a"]


def test_a_tokenizer_without_a_decoder_to_look_at():
    class Slow:
        added_tokens_decoder = ()

    with pytest.raises(XFactorError, match="Slow does not say how its tokens are spelt"):
        spelling(Slow())
    Slow.sp_model = object()
    assert spelling(Slow()).decoded("▁the") == b" the"
    assert spelling(Slow()).decoded("<0x0A>") == b"\n"


def test_the_bundled_adapters_sets_are_what_they_were():
    root = Path(xfactor_peft.__file__).parent
    tokenizer = AutoTokenizer.from_pretrained(root / "demo_model")
    for name in ("demo-X", "demo-Z"):
        record = json.loads((root.parent / "adapters" / name / "xfactor.json").read_text())["tokens"]
        assert TokenSet.contains(tokenizer, record["rule"]["value"]).hash == record["hash"]
