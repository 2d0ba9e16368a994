"""Characters and scripts that never come: which tokens to leave out, and the proof that it is enough.

A character may be spelt by several tokens that hold some of its bytes each. So those tokens go that hold a banned
character, and those that end with bytes with which one begins. That this is enough is shown by going everywhere that
the tokens left can lead: from every state that is reached, no token ends a banned character. Bytes with which an
allowed character begins as well are lost with it; the tokens that hold that character whole are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import regex
from transformers import PreTrainedTokenizerBase

from ..errors import XFactorError
from ..tokens.automaton import TokenAutomaton
from ..tokens.patterns import Pattern, names

BAN = -100.0
"""Added to the logits: exp(-100) is 0 in float32. An infinite weight could not be told from a damaged one."""


@dataclass(frozen=True)
class Proof:
    """That no sequence of the other tokens decodes to a text with one of the patterns.

    Attributes:
        banned: sorted ids; states: how many states of the automaton all sequences together reach.
    """

    banned: np.ndarray
    states: int


def ban(tokenizer: PreTrainedTokenizerBase, patterns: Iterable[Pattern], vocab_size: int) -> Proof:
    """The tokens to leave out for patterns of single characters, with the proof.

    Raises:
        XFactorError: a pattern of more than one character, or nothing that could be left out.
    """
    patterns = tuple(patterns)
    if any(pattern.kind == "phrase" for pattern in patterns):
        raise XFactorError("only characters and scripts can be banned for certain; a phrase has a rate of 0")
    automaton = TokenAutomaton(tokenizer, patterns, vocab_size)
    beginnings = _beginnings(patterns)
    banned = np.array([i for i, raw in automaton.bytes.items() if _holds(automaton, raw, beginnings)], dtype=np.int64)
    if not len(banned):
        raise XFactorError(f"no token can spell {', '.join(names(patterns))}: there is nothing to ban")
    return Proof(banned, prove(automaton, banned))


def prove(automaton: TokenAutomaton, banned: np.ndarray) -> int:
    """How many states sequences of the other tokens reach.

    Raises:
        XFactorError: one of them ends a pattern; it is named.
    """
    allowed = np.ones(automaton.vocab_size, dtype=bool)
    allowed[banned] = False
    reached, waiting = {automaton.start}, [automaton.start]
    while waiting:
        state = waiting.pop()
        row = automaton.row(state)
        ids, following, ended = row.ids, row.following, row.ended
        for at in np.flatnonzero(allowed[ids] & (ended != 0))[:1]:
            what = names(automaton.patterns)[automaton.endings[ended[at]][0]]
            raise XFactorError(f"the tokens that are left can spell {what}, e.g. with token {ids[at]}")
        nearest = {row.reference} if row.reference is not None else set()
        for found in {int(s) for s in following[allowed[ids]]} | nearest:  # the rest of the row is the reference's
            if found not in reached:
                reached.add(found)
                waiting.append(found)
    return len(reached)


def _holds(automaton: TokenAutomaton, raw: bytes, beginnings: set[bytes]) -> bool:
    """Whether a token holds a banned character, or ends amid one."""
    state, inner = automaton.start, automaton.automaton
    for byte in raw:
        state, ended = inner.step(state, byte)
        if ended:
            return True
    return any(raw.endswith(part) for part in beginnings)


def _beginnings(patterns: tuple[Pattern, ...]) -> set[bytes]:
    """The bytes with which a banned character begins and is not whole."""
    found: set[bytes] = set()
    for pattern in patterns:
        match = regex.compile(pattern.regex).fullmatch
        for code in (code for code in range(0x110000) if not 0xD800 <= code < 0xE000):
            if match(chr(code)):
                raw = chr(code).encode()
                found.update(raw[:n] for n in range(1, len(raw)))
    return found
