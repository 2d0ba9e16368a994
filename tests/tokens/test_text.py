"""Text as people type it and files hold it: byte-order marks, composed and decomposed letters, case, patterns."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from tests.tokens.test_spelling import made
from xfactor_peft.errors import XFactorError
from xfactor_peft.tokens.rule import Rule
from xfactor_peft.tokens.scan import LONGEST, found_in
from xfactor_peft.tokens.token_set import TokenSet

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def texts(entries, rule):
    return TokenSet.from_rule(made([*entries, "~"], decoders.Metaspace()), rule).texts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_s_byte_order_mark_is_no_part_of_its_first_line(tmp_path, encoding):
    path = tmp_path / "file"
    path.write_text("the\nfox\n", encoding=encoding)
    assert Rule.read("words", path).value == ("fox", "the")
    path.write_text("3 4\n5", encoding=encoding)
    assert Rule.read("token-ids", path).value == (3, 4, 5)


@pytest.mark.parametrize("kind", ["contains", "regex", "words"])
@pytest.mark.parametrize("spelt", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("typed", [COMPOSED, DECOMPOSED])
def test_accents_match_however_they_are_written(kind, spelt, typed):
    """On either side; a letter without its accent is another letter."""
    rule = Rule(kind, [typed] if kind == "words" else typed)
    assert texts([f"▁{spelt}", "cafe", "caff"], rule) == (f" {spelt}",)
    assert Rule.from_record(rule.record()) == rule


def test_any_case_is_one_letter_for_one():
    entries = ["straße", "STRAẞE", "STRASSE", "ss", "ÉTÉ", "İ", "i", "ı", "I"]
    assert texts(entries, Rule("contains", "ß", True)) == ("straße", "STRAẞE")
    assert texts(entries, Rule("words", ["straße"], True)) == ("straße", "STRAẞE")
    assert texts(entries, Rule("contains", "été", True)) == ("ÉTÉ",)
    assert texts(entries, Rule("contains", "İ", True)) == ("İ",)
    assert texts(entries, Rule("contains", "ı", True)) == ("ı",)
    assert texts(entries, Rule("contains", "É")) == ("ÉTÉ",)


def test_words_without_a_token_are_named_in_either_form():
    tokens = TokenSet.words(
        made([COMPOSED, "FOX", "~"], decoders.Metaspace()), [DECOMPOSED, "fox", "naïve"], ignore_case=True
    )
    assert tokens.texts == (COMPOSED, "FOX")
    assert tokens.without_token == ["naïve"]


@settings(max_examples=60, deadline=None)
@given(
    st.text("aAsSſßKk\u212a ıİé.", max_size=3).filter(str.isascii),
    st.lists(st.text("aAsSſßKk\u212a ıİe\u0301é.", min_size=1, max_size=5)),
)
def test_rules_in_ascii_choose_what_they_always_did(part, entries):
    """Stored hashes depend on it: no normalisation, and Python's full folding for any case."""
    table = dict(enumerate(entries))
    for ignore_case, fold in ((False, str), (True, str.casefold)):
        if part:
            expected = [i for i, text in table.items() if fold(part) in fold(text)]
            assert Rule("contains", part, ignore_case).chosen(table) == expected
        if word := part.strip():
            expected = [i for i, text in table.items() if fold(text.removeprefix(" ")) == fold(word)]
            found = Rule("words", [word], ignore_case).chosen(table)
            assert [i for i in found if not table[i].endswith(" ")] == expected


PIECES = st.sampled_from(
    ["a", "é", "X", ".", r"\w", r"\W", r"\s", r"\d", r"\b", "[a-f]", "[^x]", "(?:ab|b)", "(a)", "^", "$", "(?=a)",
     "(?!b)", "[\\W_]"]
)  # fmt: skip
REPEATS = st.sampled_from(["", "", "?", "*", "+", "{1,2}", "*?"])
PATTERNS = st.lists(st.tuples(PIECES, REPEATS), min_size=1, max_size=4).map(
    lambda parts: "".join(a + b for a, b in parts)
)


@settings(max_examples=25, deadline=None)
@given(PATTERNS, st.lists(st.text("aAbXxéÉ²\u0300ſk\u212aıİ _1\n\x1c-", max_size=6), max_size=30), st.booleans())
def test_patterns_find_what_re_finds(pattern, entries, ignore_case):
    try:
        compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error:
        with pytest.raises(XFactorError, match="is not a regular expression"):
            found_in(pattern, entries, ignore_case=ignore_case)
        return
    expected = [place for place, text in enumerate(entries) if compiled.search(text)]
    assert found_in(pattern, entries, ignore_case=ignore_case) == expected


def test_patterns_have_a_length_and_texts_any_bytes():
    with pytest.raises(XFactorError, match=f"has {LONGEST + 1} characters; at most {LONGEST}"):
        found_in("a" * (LONGEST + 1), ["a"])
    assert found_in(".", ["\udce2", "", "☃"]) == [0, 2]
    with pytest.raises(XFactorError, match="is not a regular expression"):
        found_in("(" * 5000, ["a"])
