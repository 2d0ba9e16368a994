"""Characters and scripts that never come: which tokens to leave out, and the proof that it is enough.

A text holds a character only where the bytes of its UTF-8 encoding stand in a row. With tokens t1 t2 ... they begin in
one token, and either end in it as well, or that token ends with some of the first of them. So no text of the other
tokens holds a banned character, when those are left out that hold one whole and those that end with the beginning of
one. Bytes with which an allowed character begins as well are lost with them; tokens that hold that character whole are
not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import regex
from transformers import PreTrainedTokenizerBase

from ..errors import XFactorError
from ..tokens.patterns import Pattern, names
from ..tokens.token_bytes import markers, token_bytes

REPLACEMENT = "\ufffd"
BAN = -100.0
"""Added to the logits: exp(-100) is 0 in float32. An infinite weight could not be told from a damaged one."""


@dataclass(frozen=True)
class Proof:
    """That no sequence of the other tokens decodes to a text with one of the characters.

    Attributes:
        banned: sorted ids; checked: how many other tokens were looked at, which are all.
    """

    banned: np.ndarray
    checked: int


def ban(tokenizer: PreTrainedTokenizerBase, patterns: Iterable[Pattern], vocab_size: int) -> Proof:
    """The tokens to leave out for patterns of single characters, with the proof.

    Raises:
        XFactorError: a pattern of more than one character, U+FFFD, which bytes of no character are shown as, or nothing
            that could be left out.
    """
    shown = {i: marker.encode() for i, marker in markers(tokenizer).items()}  # not special, so they can be drawn
    texts = {i: raw for i, raw in {**token_bytes(tokenizer), **shown}.items() if i < vocab_size}
    encodings = characters(patterns)
    banned = np.array([i for i, raw in sorted(texts.items()) if fault(raw, encodings)], dtype=np.int64)
    if not len(banned):
        raise XFactorError(f"no token can spell {', '.join(names(tuple(patterns)))}: there is nothing to ban")
    return Proof(banned, prove(texts, banned, encodings))


def characters(patterns: Iterable[Pattern]) -> dict[bytes, str]:
    """The UTF-8 encodings of all characters that the patterns mean, and the beginnings of these, with the character.

    Raises:
        XFactorError: as for `ban`.
    """
    if any(pattern.kind == "phrase" for pattern in patterns):
        raise XFactorError("only characters and scripts can be banned for certain; a phrase has a rate of 0")
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    found: dict[bytes, str] = {}
    for character in (c for pattern in patterns for c in regex.findall(pattern.regex, every)):
        if character == REPLACEMENT:
            raise XFactorError(f"{REPLACEMENT} (U+FFFD) is shown for bytes that are no character; it cannot be banned")
        raw = character.encode()
        for length in range(1, len(raw) + 1):
            found.setdefault(raw[:length], character)
    return found


def prove(texts: Mapping[int, bytes], banned: np.ndarray, encodings: Mapping[bytes, str]) -> int:
    """Look at every token that is left; returns how many they are.

    Raises:
        XFactorError: one of them holds a banned character, or ends with the beginning of one; both are named.
    """
    left = sorted(set(texts) - set(banned.tolist()))
    for i in left:
        if what := fault(texts[i], encodings):
            raise XFactorError(f"the tokens that are left can spell {what!r}, e.g. with token {i}")
    return len(left)


def fault(raw: bytes, encodings: Mapping[bytes, str]) -> str:
    """The banned character that a token holds, or ends with the beginning of; "" for none."""
    for start in range(len(raw)):
        for length in range(1, min(4, len(raw) - start) + 1):
            character = encodings.get(raw[start : start + length], "")
            if character and (start + length == len(raw) or length == len(character.encode())):
                return character
    return ""
