"""The byte automaton run over tokens: from any state, where each of the vocabulary's tokens leads.

A row of V entries would cost a state V numbers. Nearly all tokens do the same from every state inside a word, and from
every state outside of one, so a row is what differs from one of those two (`ByteAutomaton.inside_word`, `.start`). It
is found by walking the vocabulary's trie only as far as the two walks differ: a few nodes, not V. A whole word that
only waits to be no part of a longer one ends with half of the vocabulary; that is one entry of the row, too.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from .byte_automaton import ByteAutomaton
from .patterns import Pattern, is_word
from .token_bytes import token_bytes


@dataclass(frozen=True)
class Row:
    """Where tokens lead from a state: as `reference`'s row has it, but for these (all with text, where it is None).

    Where all patterns are ASCII phrases, tokens in which another character comes are taken to lead where they lead from
    `reference`; `TokenAutomaton.step` is exact for them, too.

    Attributes:
        waiting: patterns that end with every token that does not begin with a word's character.
        ids: sorted; following: the states they lead to; ended: the patterns that end on the way, `waiting` included, as
            numbers of `TokenAutomaton.endings`.
    """

    reference: int | None
    waiting: tuple[int, ...]
    ids: np.ndarray
    following: np.ndarray
    ended: np.ndarray


def places_in(row: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each of `ids` stands in a sorted row, whether it does); either may be empty."""
    return np.searchsorted(row, ids), np.isin(ids, row)


class TokenAutomaton:
    """Patterns over the texts that a vocabulary spells.

    A token that stands for no text (an end, a chat's marker, an id without a token) ends one text and begins another.

    Attributes:
        endings: tuples of patterns that end together; number 0 is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patterns: Sequence[Pattern], vocab_size: int) -> None:
        self.patterns, self.vocab_size = tuple(patterns), vocab_size
        self.bytes = {i: raw for i, raw in token_bytes(tokenizer).items() if i < vocab_size}
        self.automaton = ByteAutomaton(self.patterns)
        self.start = self.automaton.start
        # Amid an ASCII phrase the first byte of another character would be two hundred states that lead nowhere.
        ascii_only = all(pattern.kind == "phrase" and pattern.body.isascii() for pattern in self.patterns)
        self._told_apart = 128 if ascii_only else 256
        self.endings: list[tuple[int, ...]] = [()]
        self._ending_numbers: dict[tuple[int, ...], int] = {(): 0}
        self._rows: dict[int, Row] = {}
        self._walks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def step(self, state: int, token: int) -> tuple[int, tuple[int, ...]]:
        """(the next state, patterns that end) of one token."""
        raw, ended = self.bytes.get(token), tuple[int, ...]()
        if raw is None:
            return self.start, self.automaton.ending(state)
        for byte in raw:
            state, done = self.automaton.step(state, byte)
            ended += done
        return state, ended

    def run(self, ids: Iterable[int], state: int | None = None) -> tuple[list[int], list[tuple[int, ...]]]:
        """The states before each token and after the last (n + 1), and the patterns that end with each (n)."""
        states, ended = [self.start if state is None else state], []
        for i in ids:
            following, done = self.step(states[-1], i)
            states.append(following)
            ended.append(done)
        return states, ended

    def counts(self, ids: Iterable[int], state: int | None = None) -> np.ndarray:
        """Occurrences of every pattern in a text that ends after the last token, (K,) int."""
        states, ended = self.run(ids, state)
        found = np.zeros(len(self.patterns), dtype=np.int64)
        for number in (n for done in (*ended, self.automaton.ending(states[-1])) for n in done):
            found[number] += 1
        return found

    def row(self, state: int) -> Row:
        """Where every token leads from a state."""
        if state not in self._rows:
            self._rows[state] = self._made_row(state)
        return self._rows[state]

    def reference(self, state: int) -> int:
        """The state with nothing under way whose row is nearest: inside a word or outside of one."""
        return self.automaton.inside_word if self.automaton.after_word(state) else self.automaton.start

    def _made_row(self, state: int) -> Row:
        reference = self.reference(state)
        if state == reference:
            following, ended = (part[self._trie.node] for part in self._walk(state))
            ids = np.flatnonzero(self._trie.node >= 0)
            return Row(None, (), ids, following[ids], ended[ids])
        nodes, following, ended = self._difference(state, reference)
        trie = self._trie
        first, last = (np.searchsorted(trie.sorted_node, nodes, side) for side in ("left", "right"))
        ids = trie.by_node[_ranges(first, last)]
        parts = [np.repeat(part, last - first) for part in (following, ended)]
        order = np.argsort(ids)
        return Row(reference, self.automaton.ending(state), ids[order], parts[0][order], parts[1][order])

    @cached_property
    def begins_word(self) -> np.ndarray:
        """Whether a token's first character belongs to a word, (V,) bool."""
        return (self._trie.node >= 0) & (self._trie.first[self._trie.node] == 1)

    def _walk(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """(state, patterns ended) at every node of the vocabulary's trie; only for the two states of reference."""
        if state not in self._walks:
            trie = self._trie
            states = np.full(len(trie.parent), state, dtype=np.int32)
            ended = np.zeros(len(trie.parent), dtype=np.int32)
            for first, last in trie.levels[1:]:
                level, parents = slice(first, last), trie.parent[first:last]
                states[level], ended[level] = self._steps(states[parents], trie.byte[level], ended[parents])
            self._walks[state] = states, ended
        return self._walks[state]

    def _difference(self, state: int, reference: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(nodes, states, patterns ended) where the walk from `state` differs from the one from `reference`."""
        trie, (same, same_ended), waiting = self._trie, self._walk(reference), self.automaton.ending(state)
        nodes, states, ended = np.zeros(1, np.int64), np.array([state]), np.zeros(1, np.int32)
        found = [(nodes[:0], states[:0], ended[:0])]
        while len(nodes):
            counts = trie.last_child[nodes] - trie.first_child[nodes]
            below = _ranges(trie.first_child[nodes], trie.last_child[nodes])
            states, ended = self._steps(np.repeat(states, counts), trie.byte[below], np.repeat(ended, counts))
            expected = np.where(trie.first[below] == 0, self._joined(waiting, same_ended[below]), same_ended[below])
            other = ((states != same[below]) | (ended != expected)) & (trie.byte[below] < self._told_apart)
            nodes, states, ended = below[other], states[other], ended[other]
            found.append((nodes, states, ended))
        joined = [np.concatenate(part) for part in zip(*found, strict=True)]
        order = np.argsort(joined[0], kind="stable")
        return joined[0][order], joined[1][order], joined[2][order]

    def _steps(self, states: np.ndarray, byte: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One byte from many states: the next ones, and `ended` with what ends; the distinct steps are few."""
        keys, place = np.unique(states.astype(np.int64) << 8 | byte, return_inverse=True)
        steps = [self.automaton.step(int(key) >> 8, int(key) & 255) for key in keys]
        following = np.fromiter((step[0] for step in steps), np.int32, len(steps))[place]
        done = np.fromiter((self._ending(step[1]) for step in steps), np.int32, len(steps))[place]
        joined = np.where(done == 0, ended, done)
        for at in np.flatnonzero((done != 0) & (ended != 0)):
            joined[at] = self._ending(self.endings[ended[at]] + self.endings[done[at]])
        return following, joined

    def _joined(self, before: tuple[int, ...], ended: np.ndarray) -> np.ndarray:
        """Numbers of endings with `before` put before each."""
        if not before:
            return ended
        numbers, place = np.unique(ended, return_inverse=True)
        return np.array([self._ending(before + self.endings[n]) for n in numbers], dtype=np.int32)[place]

    def _ending(self, patterns: tuple[int, ...]) -> int:
        number = self._ending_numbers.setdefault(patterns, len(self.endings))
        if number == len(self.endings):
            self.endings.append(patterns)
        return number

    @cached_property
    def _trie(self) -> _VocabularyTrie:
        return _VocabularyTrie(self.bytes, self.vocab_size)


class _VocabularyTrie:
    """The beginnings of all tokens, level by level; node 0 is the empty one.

    Attributes:
        parent, byte: of every node; levels: (first, last) node of each length.
        first_child, last_child: a node's children are numbered from one up to below the other.
        first: whether the first character belongs to a word: 1, 0, or -1 where it is not whole yet.
        node: of every token, -1 for one without text; by_node, sorted_node: tokens in the order of their nodes.
    """

    def __init__(self, texts: dict[int, bytes], vocab_size: int) -> None:
        ids = np.array(sorted(texts), dtype=np.int64)
        lengths = np.array([len(texts[i]) for i in ids])
        flat = np.frombuffer(b"".join(texts[i] for i in ids), dtype=np.uint8)
        offsets = np.cumsum(lengths) - lengths
        self.node = np.full(vocab_size, -1, dtype=np.int64)
        parents, values, self.levels = [np.zeros(1, np.int32)], [np.zeros(1, np.uint8)], [(0, 1)]
        at, alive = np.zeros(len(ids), dtype=np.int64), np.arange(len(ids))
        for depth in range(int(lengths.max(initial=0)) + 1):
            done = lengths[alive] == depth
            self.node[ids[alive[done]]] = at[alive[done]]
            alive = alive[~done]
            if not len(alive):
                break
            keys, place = np.unique(at[alive] << 8 | flat[offsets[alive] + depth], return_inverse=True)
            first = self.levels[-1][1]
            parents.append((keys >> 8).astype(np.int32))
            values.append((keys & 255).astype(np.uint8))
            self.levels.append((first, first + len(keys)))
            at[alive] = first + place
        self.parent, self.byte = np.concatenate(parents), np.concatenate(values)
        every = np.arange(len(self.parent))  # parents are sorted, since each level is sorted by them
        self.first_child = np.searchsorted(self.parent[1:], every, "left") + 1
        self.last_child = np.searchsorted(self.parent[1:], every, "right") + 1
        with_text = np.flatnonzero(self.node >= 0)
        order = np.argsort(self.node[with_text], kind="stable")
        self.by_node = with_text[order]
        self.sorted_node = self.node[self.by_node]
        self.first = self._first_characters()

    def _first_characters(self) -> np.ndarray:
        first = np.full(len(self.parent), -1, dtype=np.int8)
        cut: dict[int, bytes] = {0: b""}
        for start, end in self.levels[1:]:
            first[start:end] = first[self.parent[start:end]]
            for node in start + np.flatnonzero(first[start:end] < 0):
                raw = cut[int(self.parent[node])] + bytes([self.byte[node]])
                if character := codecs.getincrementaldecoder("utf-8")("replace").decode(raw):
                    first[node] = is_word(character[0])
                else:
                    cut[int(node)] = raw
        return first


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """first[0], ..., last[0] - 1, first[1], ..., one after the other."""
    counts = last - first
    starts = np.cumsum(counts) - counts
    return np.repeat(first - starts, counts) + np.arange(int(counts.sum()))
