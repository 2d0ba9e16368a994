"""Means and intervals over a handful of seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

T_975 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)
"""The 97.5 % quantile of Student's t with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with an interval; without spread to tell from, low = high = mean."""

    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float], single: tuple[float, float] | None = None) -> Estimate:
    """Mean of at most ten values and its 95 % interval, mean +- t s / sqrt(n); one value has its own, `single`."""
    centre, count = mean(values), len(values)
    if count == 1:
        return Estimate(centre, *(single or (centre, centre)))
    half = T_975[count - 2] * stdev(values) / math.sqrt(count)
    return Estimate(centre, centre - half, centre + half)
