"""Means, intervals and differences over a handful of seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` runs with an interval; without spread to tell from, low = high = mean."""

    mean: float
    low: float
    high: float
    count: int


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """x with P(T <= x) = probability > 1/2 for Student's t; by bisection on the integrated density."""
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile needs 0.5 < probability < 1 and degrees >= 1; got {probability}, {degrees}")
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(x: float, degrees: int) -> float:
    """P(T <= x) for x >= 0, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(x / math.sqrt(degrees))
    cosine, term, total = math.cos(angle) ** 2, 1.0, 0.0
    if degrees % 2 == 0:
        for k in range(degrees // 2):
            total += term
            term *= cosine * (2 * k + 1) / (2 * k + 2)
        return 0.5 + 0.5 * math.sin(angle) * total
    for k in range((degrees - 1) // 2):
        total += term
        term *= cosine * (2 * k + 2) / (2 * k + 3)
    return 0.5 + (angle + math.sin(angle) * math.cos(angle) * total) / math.pi


def over_seeds(values: Sequence[float], single: tuple[float, float] | None = None, level: float = 0.95) -> Estimate:
    """Mean of the seeds' values and mean +- t s / sqrt(n); one seed alone takes its own interval `single`."""
    centre, count = mean(values), len(values)
    if count == 1:
        low, high = single or (centre, centre)
        return Estimate(centre, low, high, 1)
    half = t_quantile(0.5 + level / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(centre, centre - half, centre + half, count)


def welch(old: Sequence[float], new: Sequence[float], level: float = 0.99) -> tuple[float, float]:
    """(difference of the means, half width of its interval); Welch's test, degrees of freedom rounded down.

    Raises:
        ValueError: fewer than two values on a side, so that there is no spread to judge by.
    """
    if min(len(old), len(new)) < 2:
        raise ValueError("a difference over seeds needs at least two seeds on both sides")
    parts = [stdev(side) ** 2 / len(side) for side in (old, new)]
    difference = mean(new) - mean(old)
    if sum(parts) == 0:
        return difference, 0.0
    weights = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (old, new), strict=True))
    degrees = max(1, int(sum(parts) ** 2 / weights))
    return difference, t_quantile(0.5 + level / 2, degrees) * math.sqrt(sum(parts))
