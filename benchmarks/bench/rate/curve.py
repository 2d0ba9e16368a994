"""The frontier of constant logit biases: their KL against the set mass that they give."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import mean

import numpy as np

from ..store import Record


class Curve:
    """KL of the exact logit bias against set mass, pooled over seeds.

    Between the measured strengths only slow functions of lambda are interpolated: log-odds of the mass less lambda, and
    KL over the KL of one context with the base's mean mass. For contexts that are all alike both would be constant.
    """

    def __init__(self, records: list[Record]) -> None:
        points: dict[float, list[Record]] = defaultdict(list)
        for record in records:
            for point in record["points"]:
                points[point["strength"]].append(point)
        keys = ("strength", "rate", "set_mass", "kl_from_base")
        self.points = [{key: mean(p[key] for p in group) for key in keys} for _, group in sorted(points.items())]
        self._base = self.points[0]["set_mass"]
        strengths, mass, kl = (np.array([p[key] for p in self.points[1:]]) for key in (keys[0], *keys[2:]))
        self._strength = np.linspace(strengths[0], strengths[-1], 2001)
        self._odds = self._strength + np.interp(self._strength, strengths, np.log(mass / (1 - mass)) - strengths)
        self._kl = self._alike(self._strength) * np.interp(self._strength, strengths, kl / self._alike(strengths))

    def _alike(self, strength: np.ndarray) -> np.ndarray:
        m = self._base
        q = m * np.exp(strength) / (1 - m + m * np.exp(strength))
        return q * np.log(q / m) + (1 - q) * np.log((1 - q) / (1 - m))

    def kl(self, mass: float) -> float | None:
        """KL at a set mass inside the measured range, else None."""
        odds = math.log(mass / (1 - mass)) if 0 < mass < 1 else math.inf
        return float(np.interp(odds, self._odds, self._kl)) if self._odds[0] <= odds <= self._odds[-1] else None
