"""The strengths that give the wanted rates, in texts that the teacher would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .goals import PhraseTarget, Wanted
from .values import Statistics, Values

ROUNDS = 30
MOST = 12.0
"""Largest strength in either direction that is tried for a rate above 0."""
RICH, RICH_IN_ALL = 0.002, 0.04
"""Occurrences per token that enriched texts hold of a pattern, and of all of them, at most."""
MOST_ENRICHED = 8.0
MANY = 1000
"""Patterns above which those of a goal are raised together."""


@dataclass(frozen=True)
class Solved:
    """lambda of every goal (G,), and the rates per token: the base's, the wanted ones, and those that lambda gives."""

    strengths: np.ndarray
    base: np.ndarray
    wanted: np.ndarray
    given: np.ndarray


def wanted_rates(wanted: Sequence[Wanted], base: np.ndarray, words_per_token: float) -> np.ndarray:
    """Rates per token, (G,), from what was asked and the base's own rates per token."""
    per = {"x": base, "w": np.full(len(base), words_per_token / 1000), "t": np.full(len(base), 1 / 1000)}
    return np.array([want.value * per[want.unit][g] for g, want in enumerate(wanted)])


def solve(
    statistics: Statistics, target: PhraseTarget, words_per_token: float, correction: np.ndarray | None = None
) -> Solved:
    """lambda such that `Values.counts` is what is wanted: lambda += log(wanted / given), until they agree.

    Args:
        correction: (G,), what the wanted rates are multiplied by first: samples of the teacher, or of the student, show
            by how much the states' averages are off.
    """
    members = target.members
    base = Values(statistics, np.zeros(len(members))).counts(members)
    wanted = wanted_rates([goal.wanted for goal in target.goals], base, words_per_token)
    aim = wanted if correction is None else wanted * correction
    never, seen = aim <= 0, base > 0
    strengths = np.where(never, -np.inf, np.log(np.where(seen & ~never, aim, 1.0) / np.where(seen, base, 1.0)))
    given = base
    for _ in range(ROUNDS):
        strengths = np.where(never, -np.inf, np.clip(strengths, -MOST, MOST))
        given = Values(statistics, members @ np.where(never, -1e9, strengths)).counts(members)
        change = np.where(never | ~seen, 0.0, np.log(np.where(never, 1.0, aim) / np.maximum(given, 1e-12)))
        if np.abs(change).max(initial=0) < 1e-3:
            break
        strengths = strengths + np.clip(change, -2, 2)
    return Solved(strengths, base, wanted, given)


def enriching(statistics: Statistics, target: PhraseTarget) -> np.ndarray:
    """lambda of every pattern (K,), at least 0, for texts that hold enough of each to learn from.

    A rare pattern is raised more than a frequent one, so that each comes about equally often; with very many patterns,
    those of a goal are raised together.
    """
    count = len(target.patterns)
    members = np.eye(count) if count <= MANY else target.members
    aim = min(RICH, RICH_IN_ALL / count) * members.sum(0)
    base = Values(statistics, np.zeros(count)).counts(members)
    return members @ np.clip(np.log(aim / np.maximum(base, 1e-12)), 0.0, MOST_ENRICHED)
