"""Patterns as a deterministic automaton over UTF-8 bytes, whose states are made when they are reached.

A state is (bytes of a character that is not whole yet, whether the last character belongs to a word, places inside
patterns): the subset construction (Rabin and Scott 1959) over a trie of the patterns' characters, one transition at a
time. What Aho and Corasick's links share, the sets share; they also hold what links cannot: word boundaries, white
space of any length, classes of characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

import regex

from ..errors import XFactorError
from .patterns import Pattern, is_word

State = tuple[bytes, bool, frozenset[int]]
_SPACE = re.compile(r"\s")


class ByteAutomaton:
    """States are numbers; 0 is the start of a text.

    `step` says which patterns end with a byte (for one that is a whole word, with the byte that shows that it is), and
    `ending` which end with the text.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._trie = _Trie(patterns)
        self._states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._steps: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.start = self._number((b"", False, frozenset()))
        self.inside_word = self._number((b"", True, frozenset()))

    def __len__(self) -> int:
        """How many states were reached so far."""
        return len(self._states)

    def step(self, state: int, byte: int) -> tuple[int, tuple[int, ...]]:
        """(the next state, the patterns that end)."""
        key = state << 8 | byte
        made = self._steps.get(key)
        if made is None:
            made = self._steps[key] = self._made(self._states[state], byte)
        return made

    def ending(self, state: int) -> tuple[int, ...]:
        """The patterns that end when the text ends here."""
        return self._trie.waiting(self._states[state][2])

    def after_word(self, state: int) -> bool:
        """Whether the last whole character belongs to a word, and no byte of another one has come."""
        return self._states[state][1] and not self._states[state][0]

    def inside(self, state: int) -> bool:
        """Whether an occurrence may be under way."""
        return bool(self._states[state][2])

    def left(self, state: int) -> int:
        """Characters that the nearest occurrence under way still lacks, at least; 0 where it lacks only its boundary.

        Raises:
            ValueError: none is under way.
        """
        return min(self._trie.left[node] for node in self._states[state][2])

    def nearest(self, state: int) -> int:
        """The pattern whose occurrence under way lacks least; raises ValueError where none is."""
        return self._trie.nearest[min(self._states[state][2], key=lambda node: self._trie.left[node])]

    def _number(self, state: State) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            self._states.append(state)
        return number

    def _made(self, state: State, byte: int) -> tuple[int, tuple[int, ...]]:
        pending, word, nodes = state
        self._decoder.setstate((pending, 0))
        ended: tuple[int, ...] = ()
        for character in self._decoder.decode(bytes([byte])):  # U+FFFD for what is no UTF-8
            nodes, done = self._trie.step(nodes, word, character)
            word, ended = is_word(character), ended + done
        return self._number((self._decoder.getstate()[0], word, nodes)), ended


class _Trie:
    """Patterns by their characters. Node 0 begins those that start at a word's start, node 1 those that start anywhere.

    An edge's label stands for (class, character): as it is, without regard to case, white space, or a script.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._children: dict[int, int] = {}
        self._inner = {0, 1}
        self._at_once: dict[int, tuple[int, ...]] = {}
        self._waiting: dict[int, tuple[int, ...]] = {}
        self._spaces: set[int] = set()
        self.left, self.nearest = [0, 0], [0, 0]
        self._labels: dict[tuple[str, str], int] = {}
        self._tests: list[Callable[[str], bool]] = []
        self._meant: dict[str, tuple[int, ...]] = {}
        for number, pattern in enumerate(patterns):
            self._add(number, pattern)

    def _add(self, number: int, pattern: Pattern) -> None:
        starts, ends = pattern.bounded
        node, keys = 0 if starts else 1, _keys(pattern)
        for place, key in enumerate(keys):
            left = len(keys) - place - 1
            following = self._children.setdefault(node << 12 | self._label(key), len(self.left))
            if following == len(self.left):
                self.left.append(left)
                self.nearest.append(number)
                self._inner.add(node)
                if key[0] == "space":
                    self._spaces.add(following)
            node = following
            if left < self.left[node]:
                self.left[node], self.nearest[node] = left, number
        ended = self._waiting if ends else self._at_once
        ended[node] = (*ended.get(node, ()), number)

    def _label(self, key: tuple[str, str]) -> int:
        label = self._labels.setdefault(key, len(self._tests))
        if label == len(self._tests):
            if label >> 12:
                raise XFactorError("the patterns have more than 4,096 different characters; give fewer")
            self._tests.append(_test(*key))
        return label

    def waiting(self, nodes: frozenset[int]) -> tuple[int, ...]:
        """The patterns that end at these nodes unless a word goes on."""
        return tuple(sorted(number for node in nodes for number in self._waiting.get(node, ())))

    def step(self, nodes: frozenset[int], word: bool, character: str) -> tuple[frozenset[int], tuple[int, ...]]:
        """(nodes, patterns that end) after a character; `word` is whether the one before it belongs to a word."""
        labels = self._meant.get(character)
        if labels is None:
            labels = tuple(label for label, test in enumerate(self._tests) if test(character))
            self._meant[character] = labels
        ended = () if is_word(character) else self.waiting(nodes)
        reached = set(nodes & self._spaces) if _SPACE.match(character) else set()
        for node in (*nodes, *(() if word else (0,)), 1):
            reached.update(self._children.get(node << 12 | label, 0) for label in labels)
        reached.discard(0)
        ended += tuple(sorted(number for node in reached for number in self._at_once.get(node, ())))
        return frozenset(node for node in reached if node in self._inner or node in self._waiting), ended


def _keys(pattern: Pattern) -> list[tuple[str, str]]:
    """The labels of a pattern's edges."""
    if pattern.kind == "script":
        return [("script", pattern.text)]
    if pattern.kind == "char":
        return [("same", pattern.text)]
    if not pattern.ignore_case:
        return [("space" if c == " " else "same", c) for c in pattern.body]
    lower = [c.lower() if len(c.lower()) == 1 else c for c in pattern.body]
    return [("space" if c == " " else "any case", c) for c in lower]


def _test(kind: str, text: str) -> Callable[[str], bool]:
    """Whether a character is one that an edge means, as `re` has it, or of scripts, which `re` has not, `regex`."""
    if kind == "same":
        return lambda character: character == text
    if kind == "script":
        return lambda character: regex.fullmatch(rf"\p{{Script={text}}}", character) is not None
    match = _SPACE.match if kind == "space" else re.compile(re.escape(text), re.IGNORECASE).fullmatch
    return lambda character: match(character) is not None
