"""The calibrated dial: which scale of an adapter gives a wanted rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..errors import XFactorError


def scale_for_rate(dial: Sequence[Sequence[float]], rate: float, name: str = "the adapter") -> float:
    """Invert the measured pairs (scale, R) at `rate`, by linear interpolation in log-odds.

    A logit bias of s b gives log-odds that are nearly linear in s, so a handful of pairs is enough.

    Raises:
        XFactorError: there are no pairs, or the rate is outside the measured range.
    """
    if len(dial) < 2:
        raise XFactorError(f"{name} holds no dial; train it with `goal.rate`, or give `scale`")
    pairs = sorted((float(scale), _odds(measured)) for scale, measured in dial)
    if not 0 < rate < 1:
        raise XFactorError(f"`rate` must be above 0 and below 1; got {rate:g}")
    wanted = _odds(rate)
    for (low, first), (high, second) in pairwise(pairs):
        if min(first, second) <= wanted <= max(first, second) and first != second:
            return low + (high - low) * (wanted - first) / (second - first)
    rates = sorted(measured for _, measured in dial)
    raise XFactorError(f"`rate={rate:g}` is outside what {name} was measured for, {rates[0]:.4f} to {rates[-1]:.4f}")


def _odds(rate: float) -> float:
    rate = min(max(rate, 1e-9), 1 - 1e-9)
    return math.log(rate / (1 - rate))
