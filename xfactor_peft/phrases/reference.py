"""Like this text: how often each pattern is in a text of people's, and what to make of rare ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import XFactorError, text_of
from ..tokens.patterns import Pattern, found, names
from .goals import PhraseGoal, PhraseTarget, Wanted
from .scores import gamma_quantile, words_of

PRIOR = 1.0
"""How many occurrences the pooled rate counts as in a pattern's own."""


@dataclass(frozen=True)
class Measured:
    """One pattern in a text: occurrences, rate per 1,000 words, and its 95 % interval."""

    pattern: Pattern
    count: int
    rate: float
    interval: tuple[float, float]


def measure(path: Path, patterns: Sequence[Pattern]) -> list[Measured]:
    """Every pattern in a text file.

    A rate is that of a gamma distribution about the pooled rate of all patterns, worth `PRIOR` occurrences, after the
    pattern's own were seen: one that is not in the text is rare, and not known to be impossible.

    Raises:
        XFactorError: the file cannot be read, is shorter than 1,000 words, or holds none of the patterns.
    """
    text = text_of(path, f"`rates_from` {path}")
    thousands = len(words_of(text)) / 1000
    if thousands < 1:
        raise XFactorError(
            f"`rates_from` {path}: {1000 * thousands:.0f} words are too few to measure rates; give 1,000"
        )
    counts = [len(found(pattern, text)) for pattern in patterns]
    pooled = sum(counts) / thousands / len(patterns)
    if not pooled:
        raise XFactorError(f"`rates_from` {path} holds none of the patterns; use =0 in place of its rates")
    out = []
    for pattern, count in zip(patterns, counts, strict=True):
        shape, scale = count + PRIOR, thousands + PRIOR / pooled
        low, high = (gamma_quantile(shape, z) / scale for z in (-1.96, 1.96))
        out.append(Measured(pattern, count, shape / scale, (low, high)))
    return out


def like(path: Path, patterns: Sequence[Pattern]) -> tuple[PhraseTarget, list[Measured]]:
    """Every pattern as a goal of its own, at its rate in the text."""
    measured = measure(path, patterns)
    labels = names(patterns)
    goals = [PhraseGoal(label, (m.pattern,), Wanted(m.rate, "w")) for label, m in zip(labels, measured, strict=True)]
    return PhraseTarget(tuple(goals)), measured
