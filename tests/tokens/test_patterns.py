"""Matches of the automaton are those of a regular expression over the decoded text, whatever the tokens."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import xfactor_peft
from tests.tiny import tiny_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import Pattern, found, phrases, read_phrases

LINES = ("rich tapestry", "tapestry", "a testament to", "delv*", "*ing", "ha ha", "it's not just", "No", "—but",
         "œuvre", "İstanbul", "straße", "the the", "in the heart of", "...", "K", "s")  # fmt: skip
PATTERNS = (
    *phrases(LINES),
    Pattern("Elara", ignore_case=False),
    Pattern("—", "char"),
    Pattern("é", "char"),
    Pattern(" ", "char"),
    Pattern("Han", "script"),
    Pattern("Cyrillic", "script"),
)
WORDS = [
    *LINES,
    "Elara",
    "elara",
    "—",
    "é",
    "中文",
    "Привет",
    " ",
    "\n",
    "\t",
    "s",
    "S",
    "ſ",
    "K",
    "_",
    "7",
    "heart",
    "a",
]


def llama_tokenizer():
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁ta", "pest", "ry", "▁rich", "▁in",
               "▁heart", "▁of", "▁a", "▁test", "ament", "▁to", "▁ha", "中", "П", "é", "—", "ing", "▁delv"]  # fmt: skip
    entries += [c for c in "abcdefghijklmnopqrstuvwxyzEHIJKNS'." if c not in entries]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(entries)}, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(f"{xfactor_peft.__path__[0]}/demo_model")


TOKENIZERS = {"byte-level": demo_tokenizer, "tiny": tiny_tokenizer, "byte fallback": llama_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def automaton(request):
    tokenizer = TOKENIZERS[request.param]()
    return TokenAutomaton(tokenizer, PATTERNS, len(tokenizer) + 3)


def random_texts(automaton, count, seed):
    """Ids at random, and those that spell parts of patterns, often cut elsewhere than the tokenizer would."""
    rng, by_bytes = random.Random(seed), {}
    for i, raw in automaton.bytes.items():
        by_bytes.setdefault(raw, i)
    every, longest = list(automaton.bytes), max(map(len, by_bytes))

    def spelt(raw):
        while raw:
            ends = [n for n in range(1, min(longest, len(raw)) + 1) if raw[:n] in by_bytes]
            if not ends:
                return
            n = rng.choice(ends)
            yield by_bytes[raw[:n]]
            raw = raw[n:]

    for _ in range(count):
        ids = []
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.3:
                ids.append(rng.choice(every))
            word = rng.choice(WORDS)
            word = rng.choice([word, word.upper(), word.title()])
            ids += spelt((rng.choice(["", " ", "  "]) + word[: rng.randint(1, len(word))]
                          if rng.random() < 0.3 else rng.choice(["", " "]) + word).encode())  # fmt: skip
        yield ids


def test_matches_are_those_of_a_regular_expression(automaton):
    total = np.zeros(len(PATTERNS), dtype=int)
    for ids in random_texts(automaton, 1500, seed=1):
        text = b"".join(automaton.bytes[i] for i in ids).decode("utf-8", "replace")
        expected = [len(found(pattern, text)) for pattern in PATTERNS]
        assert automaton.counts(ids).tolist() == expected, text
        total += expected
    if len(automaton.bytes) > 400:  # or the vocabulary cannot spell them all
        assert (total > 3).all(), dict(zip(PATTERNS, total, strict=True))
    assert total.sum() > 300


def test_decoding_agrees_with_the_bytes(automaton):
    """What "decoded text" means above is the tokenizer's own, where that is all valid UTF-8."""
    tokenizer = demo_tokenizer()
    if len(automaton.bytes) == len(TokenAutomaton(tokenizer, PATTERNS, len(tokenizer)).bytes):
        for ids in random_texts(automaton, 100, seed=2):
            assert tokenizer.decode(ids) == b"".join(automaton.bytes[i] for i in ids).decode("utf-8", "replace")


def test_a_row_is_where_every_token_leads(automaton):
    states = {s for ids in random_texts(automaton, 40, seed=3) for s in automaton.run(ids)[0]}
    differ = 0
    for state in sorted(states)[:60]:
        row = automaton.row(state)
        expected = [automaton.step(state, i) for i in range(automaton.vocab_size)]
        if row.reference is None:
            made = {i: (automaton.start, ()) for i in range(automaton.vocab_size)}
        else:
            made = {i: automaton.step(row.reference, i) for i in range(automaton.vocab_size)}
            differ += len(row.ids)
            for i in np.flatnonzero(~automaton.begins_word):
                made[i] = made[i][0], row.waiting + made[i][1]
        for i, following, ended in zip(row.ids, row.following, row.ended, strict=True):
            made[int(i)] = int(following), automaton.endings[ended]
        got = [(s, tuple(sorted(done))) for s, done in (made[i] for i in range(automaton.vocab_size))]
        assert got == [(s, tuple(sorted(done))) for s, done in expected]
    assert differ > 0


def test_rows_of_ascii_phrases_leave_other_characters_to_the_reference():
    tokenizer = demo_tokenizer()
    automaton = TokenAutomaton(tokenizer, phrases(["rich tapestry", "delv*"]), len(tokenizer))
    for text in (" rich tap", " de", " rich tapestry"):
        state = automaton.start
        for byte in text.encode():
            state = automaton.automaton.step(state, byte)[0]
        row = automaton.row(state)
        told = dict(zip(row.ids.tolist(), row.following.tolist(), strict=True))
        assert len(told) < 100
        for i, raw in automaton.bytes.items():
            if raw.isascii():
                assert told.get(i, automaton.step(row.reference, i)[0]) == automaton.step(state, i)[0]


def test_a_token_without_text_ends_a_text_and_begins_another():
    tokenizer = demo_tokenizer()
    automaton = TokenAutomaton(tokenizer, phrases(["tapestry"]), len(tokenizer))
    whole, end = tokenizer(" tapestry")["input_ids"], tokenizer.eos_token_id
    assert automaton.counts([*whole, end, *tokenizer("x")["input_ids"]]).tolist() == [1]
    assert automaton.counts([*whole, *tokenizer("x")["input_ids"]]).tolist() == [0]
    assert automaton.counts([*whole[:-1], end, *whole[-1:]]).tolist() == [0]


def test_a_large_list_on_a_large_vocabulary_is_small():
    """5,000 patterns, of which a state's row holds what they change, not the vocabulary."""
    rng = random.Random(0)
    letters = "etaoinshrdlu"
    lines = {"".join(rng.choices(letters, k=rng.randint(4, 9))) for _ in range(4000)}
    lines |= {f"{rng.choice(['the', 'of', 'in'])} {word} of" for word in sorted(lines)[:1500]}
    tokenizer = demo_tokenizer()
    automaton = TokenAutomaton(tokenizer, phrases(sorted(lines)), len(tokenizer))
    ids = tokenizer(f"the {sorted(lines)[7]} of the {sorted(lines)[77]} in the heart")["input_ids"]
    states = set(automaton.run(ids)[0])
    sizes = [len(automaton.row(s).ids) for s in states if automaton.row(s).reference is not None]
    assert max(sizes) < automaton.vocab_size / 4
    assert len(automaton.automaton) < 30 * automaton.vocab_size


def test_what_is_no_pattern_is_refused(tmp_path):
    for text, kind, message in (
        ("", "phrase", "needs text"),
        ("*", "phrase", "needs text"),
        ("a * b", "phrase", "at its start and at its end"),
        ("ab", "char", "single characters"),
        ("Klingon", "script", "no script 'Klingon'"),
        ("x", "word", "unknown kind"),
    ):
        with pytest.raises(XFactorError, match=message):
            Pattern(text, kind)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(XFactorError, match="holds no phrase"):
        read_phrases(tmp_path / "empty.txt")
    with pytest.raises(XFactorError, match="cannot be read"):
        read_phrases(tmp_path / "missing.txt")


def test_a_record_gives_the_pattern_again():
    for pattern in PATTERNS:
        assert Pattern.from_record(pattern.record()) == pattern
