"""Means and intervals over a handful of seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with an interval; without spread to tell from, low = high = mean."""

    mean: float
    low: float
    high: float


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """x with P(T <= x) = probability for Student's t.

    With T = sqrt(n) tan(a) the density of a is proportional to cos(a)^(n - 1) on (-pi/2, pi/2), integrated here.
    """
    import numpy as np

    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile needs 0 < probability < 1 and degrees >= 1; got {probability}, {degrees}")
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    share = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(np.interp(probability, share / share[-1], angles))


def over_seeds(values: Sequence[float], single: tuple[float, float] | None = None) -> Estimate:
    """Mean of the seeds' values and its 95 % interval, mean +- t s / sqrt(n); one seed alone has its own, `single`."""
    centre, count = mean(values), len(values)
    if count == 1:
        return Estimate(centre, *(single or (centre, centre)))
    half = t_quantile(0.975, count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(centre, centre - half, centre + half)
