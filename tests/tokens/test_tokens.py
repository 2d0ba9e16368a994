"""Token sets: rules, bytes, special tokens, errors."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.tokens.rule import Rule
from xfactor_peft.tokens.token_bytes import token_bytes, token_texts
from xfactor_peft.tokens.token_set import TokenSet

GPT2_TOKENIZER = Path(__file__).parents[3] / "shared" / "gpt2-tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def sentencepiece_like():
    vocabulary = {"<unk>": 0, "<s>": 1, "▁the": 2, "▁": 3, "X": 4, "<0x58>": 5, "▁Xa": 6, "é": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def test_contains_is_what_the_texts_say(tokenizer):
    chosen = TokenSet.contains(tokenizer, "X")
    texts = token_texts(tokenizer)
    assert set(chosen.ids) == {i for i, text in texts.items() if "X" in text}
    assert {" X", "X"} <= set(chosen.texts)
    both = TokenSet.contains(tokenizer, "x", ignore_case=True)
    assert set(both.ids) > set(chosen.ids) | set(TokenSet.contains(tokenizer, "x").ids) - set(both.ids)
    assert set(both.ids) == set(chosen.ids) | set(TokenSet.contains(tokenizer, "x").ids)


def test_special_tokens_are_never_members(tokenizer):
    assert "x" in tokenizer.eos_token
    assert tokenizer.eos_token_id not in TokenSet.contains(tokenizer, "x", ignore_case=True).ids
    with pytest.raises(XFactorError, match="special token"):
        TokenSet.token_ids(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="GPT-2's tokenizer files are not on this machine")
def test_gpt2_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    assert len(TokenSet.contains(tokenizer, "X")) == 90
    assert len(TokenSet.contains(tokenizer, "x", ignore_case=True)) == 984


def test_bytes_round_trip_through_the_tokenizer(tokenizer):
    text = "Xavier’s naïve ☃ fox\n"
    raw = token_bytes(tokenizer)
    assert b"".join(raw[i] for i in tokenizer(text)["input_ids"]) == text.encode()


def test_sentencepiece_spelling():
    tokenizer = sentencepiece_like()
    assert token_bytes(tokenizer) == {2: b" the", 3: b" ", 4: b"X", 5: b"X", 6: b" Xa", 7: "é".encode()}
    assert TokenSet.contains(tokenizer, "X").ids == (4, 5, 6)


def test_regex_and_words(tokenizer):
    assert set(TokenSet.regex(tokenizer, "^ ?X$").texts) == {"X", " X"}
    assert set(TokenSet.regex(tokenizer, "^ ?x$", ignore_case=True).texts) == {"X", " X", "x", " x"} & set(
        token_texts(tokenizer).values()
    )
    words = TokenSet.words(tokenizer, ["X", "the", "Xylophonist"])
    assert {"X", " X", " the"} <= set(words.texts)
    assert words.without_token == words.record()["rule"]["without_token"] == ["Xylophonist"]


def test_rule_makes_the_same_set_again(tokenizer):
    for tokens in (
        TokenSet.contains(tokenizer, "X", ignore_case=True),
        TokenSet.regex(tokenizer, "x$"),
        TokenSet.words(tokenizer, ["the", "X"], ignore_case=True),
        TokenSet.token_ids(tokenizer, [5, 9]),
    ):
        again = TokenSet.from_rule(tokenizer, Rule.from_record(tokens.record()["rule"]))
        assert again == tokens
        assert again.hash == tokens.hash
    assert TokenSet.contains(tokenizer, "X").hash != TokenSet.contains(tokenizer, "x").hash
    with pytest.raises(XFactorError, match="unknown token-set rule"):
        Rule.from_record({"kind": "magic"})


def test_records_of_rules_are_what_they_were(tokenizer):
    """Byte for byte what adapters hold since the first release; a rule read from its record is the same one."""
    ids = TokenSet.contains(tokenizer, "X").ids
    for tokens, record in (
        (TokenSet.contains(tokenizer, "X"), '{"kind": "contains", "value": "X", "ignore_case": false}'),
        (TokenSet.regex(tokenizer, "x$", ignore_case=True), '{"kind": "regex", "value": "x$", "ignore_case": true}'),
        (
            TokenSet.words(tokenizer, [" the ", "X", "Xylophonist", "X"]),
            '{"kind": "words", "value": ["X", "Xylophonist", "the"], "ignore_case": false, '
            '"without_token": ["Xylophonist"]}',
        ),
        (TokenSet.token_ids(tokenizer, [9, 5, 5]), '{"kind": "token-ids", "value": [5, 9]}'),
        (TokenSet(ids, len(tokenizer)), json.dumps({"kind": "token-ids", "value": ids})),
    ):
        assert json.dumps(tokens.record()["rule"]) == record
        assert Rule.from_record(json.loads(record)) == tokens.rule


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "unknown token-set rule ''"),
        ({"kind": ["contains"], "value": "X"}, "unknown token-set rule"),
        ({"kind": "contains", "value": 3}, "`contains` must be a text; got 3"),
        ({"kind": "words", "value": "the"}, "`words` must be a list of str; got 'the'"),
        ({"kind": "words", "value": ["the", 1]}, "`words` must be a list of str"),
        ({"kind": "token-ids", "value": [True]}, "`token_ids` must be a list of int"),
        ({"kind": "token-ids", "value": None}, "`token_ids` must be a list of int"),
        ({"kind": "regex", "value": "X", "ignore_case": "no"}, "`ignore_case` must be true or false; got 'no'"),
        ({"kind": "token-ids", "value": [1], "ignore_case": True}, "`ignore_case` has no meaning with `token_ids`"),
    ],
)
def test_records_that_hold_no_rule(record, message):
    with pytest.raises(XFactorError, match=message):
        Rule.from_record(record)


def test_share(tokenizer):
    tokens = TokenSet.token_ids(tokenizer, [5, 9])
    assert (tokens.share([]), tokens.share([5, 5, 9, 7]), tokens.share([7])) == (0.0, 0.75, 0.0)


def test_mask(tokenizer):
    tokens = TokenSet.contains(tokenizer, "X", vocab_size=len(tokenizer) + 7)
    mask = tokens.mask()
    assert mask.shape == (len(tokenizer) + 7,)
    assert mask.nonzero().flatten().tolist() == list(tokens.ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: TokenSet.contains(t, "☃☃"), "no token matches contains '☃☃'"),
        (lambda t: TokenSet.contains(t, ""), "at least one character"),
        (lambda t: TokenSet.regex(t, ""), "whole vocabulary"),
        (lambda t: TokenSet.regex(t, "("), "not a regular expression"),
        (lambda t: TokenSet.words(t, ["", "  "]), "no word"),
        (lambda t: TokenSet.words(t, ["Xylophonist"]), "no token matches"),
        (lambda t: TokenSet.token_ids(t, []), "no token matches"),
        (lambda t: TokenSet.token_ids(t, [10**6]), "outside the vocabulary"),
        (lambda t: TokenSet.token_ids(t, [-1]), "outside the vocabulary"),
        (lambda t: TokenSet(tuple(range(5)), 5), "whole vocabulary"),
    ],
)
def test_bad_rules_have_one_clear_error(tokenizer, make, message):
    with pytest.raises(XFactorError, match=message.replace("(", r"\(")):
        make(tokenizer)


def test_files(tmp_path):
    path = tmp_path / "ids"
    path.write_text("3 4\n5")
    assert Rule.read("token-ids", path).value == (3, 4, 5)
    path.write_text("3 four")
    with pytest.raises(XFactorError, match="expected whole numbers"):
        Rule.read("token-ids", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(XFactorError, match="UTF-8"):
        Rule.read("words", path)
