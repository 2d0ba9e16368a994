"""What is asked of patterns: never, a rate per thousand words or tokens, or a factor of the base's own rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.adapter import AdapterInfo
from ..errors import XFactorError
from ..tokens.patterns import Pattern, phrases, read_phrases

UNITS = {"x": "of the base's own", "w": "per 1,000 words", "t": "per 1,000 tokens"}
KINDS = ("phrases", "phrase", "chars", "script")
_RATE = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)/1000(w|t)", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """How much is wanted: a number and its unit, one of `UNITS`; 0 is never, in every unit.

    Raises:
        XFactorError: an unknown unit, or a number that is negative or not finite.
    """

    value: float
    unit: str = "x"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise XFactorError(f"unknown unit of a rate {self.unit!r}; known: {', '.join(UNITS)}")
        if not (isinstance(self.value, int | float) and 0 <= self.value < math.inf):
            raise XFactorError(f"a wanted rate must be at least 0; got {self.value!r}")

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """ "0", "x0.1", "2.0/1000w" or "2.0/1000t"; raises XFactorError for anything else."""
        text = str(text).strip()
        try:
            if match := _RATE.fullmatch(text):
                return cls(float(match[1]), match[2])
            if text.startswith("x"):
                return cls(float(text[1:]), "x")
            if float(text) == 0:
                return cls(0.0)
        except ValueError:
            pass
        raise XFactorError(f"{text!r} is no rate of phrases; write 0, x0.1, 2.0/1000w or 2.0/1000t")

    def text(self) -> str:
        """What `parse` reads."""
        if self.value == 0:
            return "0"
        return f"x{self.value!r}" if self.unit == "x" else f"{self.value!r}/1000{self.unit}"

    def describe(self) -> str:
        if self.value == 0:
            return "never"
        return f"x{self.value:g}" if self.unit == "x" else f"{self.value:g}/1000{self.unit}"


@dataclass(frozen=True)
class PhraseGoal:
    """Patterns that are counted together, and how much of them is wanted."""

    name: str
    patterns: tuple[Pattern, ...]
    wanted: Wanted

    @property
    def hard(self) -> bool:
        """Whether it is a ban that can be a proof: characters or scripts, never."""
        return self.wanted.value == 0 and all(pattern.kind != "phrase" for pattern in self.patterns)

    def record(self) -> dict[str, Any]:
        patterns = [pattern.record() for pattern in self.patterns]
        return {"name": self.name, "patterns": patterns, "rate": self.wanted.value, "unit": self.wanted.unit}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PhraseGoal:
        """The inverse of `record`."""
        patterns = tuple(Pattern.from_record(pattern) for pattern in record["patterns"])
        return cls(str(record["name"]), patterns, Wanted(record["rate"], record["unit"]))


@dataclass(frozen=True)
class PhraseTarget:
    """Several goals at once.

    Raises:
        XFactorError: no goal, or a pattern that two goals name.
    """

    goals: tuple[PhraseGoal, ...]

    def __post_init__(self) -> None:
        if not self.goals:
            raise XFactorError("a target needs at least one goal")
        seen: dict[Pattern, str] = {}
        for goal in self.goals:
            for pattern in goal.patterns:
                if pattern in seen:
                    raise XFactorError(f"{pattern.text!r} is in {seen[pattern]} and in {goal.name}; leave it in one")
                seen[pattern] = goal.name

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(pattern for goal in self.goals for pattern in goal.patterns)

    @cached_property
    def members(self) -> np.ndarray:
        """Which pattern counts for which goal, (K, G) float."""
        sizes = [len(goal.patterns) for goal in self.goals]
        return np.repeat(np.eye(len(sizes)), sizes, axis=0)

    def record(self) -> dict[str, Any]:
        return {"kind": "phrases", "goals": [goal.record() for goal in self.goals]}


def is_phrase_goal(text: str) -> bool:
    """Whether KIND:VALUE=RATE is about patterns over text, not about tokens."""
    return text.partition(":")[0] in KINDS


def parse_phrase_goal(text: str, *, ignore_case: bool = True) -> PhraseGoal:
    """KIND:VALUE=RATE: phrases:FILE, phrase:TEXT, chars:TEXT or script:NAMES (with commas); see `Wanted.parse`.

    Raises:
        XFactorError: the text has another form, or as for its parts.
    """
    kind, _, rest = text.partition(":")
    value, equals, rate = rest.rpartition("=")
    if kind not in KINDS or not equals or not value:
        raise XFactorError(f"`goal` {text!r}: expected KIND:VALUE=RATE with KIND one of {', '.join(KINDS)}")
    return phrase_goal(kind, value, Wanted.parse(rate), ignore_case=ignore_case)


def phrase_goal(kind: str, value: str | Path, wanted: Wanted, *, ignore_case: bool = True) -> PhraseGoal:
    """A goal as a user names it, by one of `KINDS`; raises XFactorError as for its parts."""
    if kind == "phrases":
        return PhraseGoal(str(value), read_phrases(value, ignore_case=ignore_case), wanted)
    if kind == "phrase":
        return PhraseGoal(str(value), phrases([str(value)], ignore_case=ignore_case), wanted)
    parts: Iterable[str] = str(value) if kind == "chars" else (part.strip() for part in str(value).split(","))
    one = "char" if kind == "chars" else "script"
    patterns = tuple({Pattern(part, one): None for part in parts})
    return PhraseGoal(f"{kind} {value}", patterns, wanted)


def describe(goals: Sequence[PhraseGoal]) -> str:
    """In words, for messages."""
    return ", ".join(f"{goal.name} ({len(goal.patterns)}) {goal.wanted.describe()}" for goal in goals)


def goals_from(adapters: Iterable[AdapterInfo]) -> list[PhraseGoal]:
    """What adapters for phrases were trained for, by their records; others have none.

    Raises:
        XFactorError: a record that this package did not write so.
    """
    goals = []
    for info in adapters:
        try:
            goals += [PhraseGoal.from_record(record) for record in info.section("phrases").get("goals", ())]
        except (AttributeError, KeyError, TypeError) as error:
            raise XFactorError(f"adapter {info.name}: its record of phrases is damaged") from error
    return goals


def patterns_of(adapters: Iterable[AdapterInfo]) -> tuple[Pattern, ...]:
    """What adapters for phrases are about, each pattern once."""
    return tuple({pattern: None for goal in goals_from(adapters) for pattern in goal.patterns})
