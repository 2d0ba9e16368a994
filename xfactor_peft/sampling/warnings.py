"""What a reader of scores should be told: texts that fell apart, rates missed, texts of nothing but the set."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokens.rule import Rule
from .metrics import Evaluation

COLLAPSE_DISTINCT, COLLAPSE_PERPLEXITY = 0.5, 10.0
ALL_OR_NOTHING = 0.4
"""Variance of R between texts over R(1 - R), which is 1 where a text holds either nothing but set tokens or none."""


def collapse_warnings(before: Evaluation, after: Evaluation) -> list[str]:
    """Says so when samples fell apart: distinct-2 below half, or perplexity above ten times, of what it was."""
    found = []
    if after.distinct_2 < COLLAPSE_DISTINCT * before.distinct_2:
        found.append(f"distinct-2 fell from {before.distinct_2:.3f} to {after.distinct_2:.3f}, below half")
    if after.perplexity > COLLAPSE_PERPLEXITY * before.perplexity:
        found.append(
            f"perplexity under the base rose from {before.perplexity:.0f} to {after.perplexity:.0f}, above tenfold"
        )
    return [f"the text has collapsed: {text}" for text in found]


def rate_warnings(wanted: Sequence[float], scores: Evaluation) -> list[str]:
    """One for each wanted rate outside the interval of the sampled one, and one for texts that are all or nothing."""
    goals = scores.goals or ({"rate": scores.rate, "interval": scores.interval, "spread": scores.spread, "rule": None},)
    found = []
    for rate, goal in zip(wanted, goals, strict=True):
        (low, high), name = goal["interval"], f" of {Rule.from_record(goal['rule']).describe()}" if goal["rule"] else ""
        if not low <= rate <= high:
            found.append(
                f"R{name} is {goal['rate']:.4f} ({low:.4f}–{high:.4f}) on these prompts, not the wanted {rate:g}: "
                "they are unlike those it was calibrated on; give some like them as `prompts`, or scale the adapter"
            )
        if goal["spread"] ** 2 > ALL_OR_NOTHING * goal["rate"] * (1 - goal["rate"]) > 0:
            found.append(
                f"R{name} is an average of extremes: texts differ by {goal['spread']:.2f}, so that some are nearly all "
                "set tokens and the others have hardly any; a larger set or a lower rate spreads them out"
            )
    return found
