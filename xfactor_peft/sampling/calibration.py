"""The control laws of a rate: for a tilt, texts weighed again; for another fixed policy, a line through measurements;
while one learns, feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..objective.tilt import MAX_STRENGTH
from .reweighting import SLOPE, Estimate, TiltedSamples, log_odds

ROUNDS = (32, 64, 64, 64, 96, 128, 128, 192)
"""Texts of each round in which a tilt is calibrated, at most."""
TIGHT = 0.05
"""Standard error of the log-odds of a rate at which they end: a twentieth of a small rate. After other prompts than
the openings that are calibrated on, a rate differs by more."""
LEAST_TEXTS = 12
"""Effective texts below which a tilt is too far from those that were sampled to be weighed."""


@dataclass
class RateController:
    """Holds sampled rates at the wanted ones while a policy learns: proportional-integral control in log-odds.

        e = clamp(logit R - logit measured, -limit, limit),   I += gain e,   lambda = I + proportional e

    A goal of 0 keeps its strength.

    Attributes:
        wanted: R (K,).
        integral: I (K,), lambda at the start.
        strengths: lambda (K,).
        error: e (K,) of the last update.
    """

    wanted: torch.Tensor
    integral: torch.Tensor
    gain: float = 0.15
    proportional: float = 0.3
    limit: float = 2.0

    def __post_init__(self) -> None:
        self.strengths, self.error = self.integral.clone(), torch.zeros_like(self.integral)

    def update(self, measured: torch.Tensor) -> torch.Tensor:
        """lambda (K,) after rates (K,) were measured."""
        error = (log_odds(self.wanted) - log_odds(measured)).clamp(-self.limit, self.limit)
        self.error = torch.where(self.wanted > 0, error, 0.0).to(self.integral)
        self.integral = (self.integral + self.gain * self.error).clamp(-MAX_STRENGTH, MAX_STRENGTH)
        self.strengths = self.integral + self.proportional * self.error
        return self.strengths


Trace = list[dict[str, list[float]]]


def calibrate(
    measure: Callable[[torch.Tensor, int], torch.Tensor],
    offset: torch.Tensor,
    rates: torch.Tensor,
    *,
    least: int = 3,
    most: int = 7,
    tolerance: float = 0.04,
) -> tuple[torch.Tensor, Trace]:
    """Find the offset (K,) at which the sampled rates (K,) are the wanted ones.

    `measure(offset, round)` samples afresh in every round, and all rounds count: near the goal the log-odds of the
    rate are a line in the offset, whose height is the mean over rounds; offsets far from the last one count less.
    So the error falls with the number of samples in all rounds, not with those of the last. It ends after `least` to
    `most` rounds, when the offset changes by less than `tolerance`.

    Returns the offset and every round's pair.
    """
    wanted = log_odds(rates)
    free = rates > 0
    offsets, odds, trace = [], [], []
    for index in range(most):
        measured = measure(offset, index)
        trace.append({"offset": offset.tolist(), "rates": measured.tolist()})
        offsets.append(offset)
        odds.append(log_odds(measured))
        x, y = torch.stack(offsets), torch.stack(odds)
        weights = 1 / (0.05**2 + (0.3 * (x - x[-1])) ** 2)
        slope = _slope(x, y)
        height = (weights * (y - slope * x)).sum(0) / weights.sum(0)
        following = torch.where(free, (wanted - height) / slope, offset)
        change = following - offset
        offset = offset + change.clamp(-2, 2)
        if index + 1 >= least and change.abs().max() < tolerance:
            break
    return offset, trace


def calibrate_tilt(
    measure: Callable[[torch.Tensor, int, int], Estimate],
    samples: TiltedSamples,
    strengths: torch.Tensor,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, Trace]:
    """Find lambda (K,) at which texts of the tilted base hold the wanted rates (K,).

    `measure(lambda, texts, round)` draws fresh texts into `samples`. All texts of all rounds, weighed, then give the
    next lambda. It ends when they know the rates well enough (`TIGHT`), and when the last texts, which were drawn where
    the others said, agree within three of their standard errors.

    Returns lambda and every round's pair.
    """
    goal, free = log_odds(wanted), wanted > 0
    trace: Trace = []
    if not free.any():
        return strengths, trace
    for index, texts in enumerate(ROUNDS):
        fresh = measure(strengths, texts, index)
        trace.append({"offset": strengths.tolist(), "rates": fresh.rates.tolist()})
        off = torch.where(free, goal - log_odds(fresh.rates), 0.0)
        solved = samples.solve(wanted, strengths)
        known = samples.estimate(solved)
        strengths = solved if known.texts >= LEAST_TEXTS else strengths + (off / SLOPE).clamp(-2, 2)
        agrees = bool((off.abs() < 3 * fresh.errors)[free].all())
        if index and agrees and known.texts >= LEAST_TEXTS and known.errors[free].max() < TIGHT:
            break
    return strengths, trace


def _slope(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Least-squares slope of each column, held near `SLOPE` by a weak prior."""
    dx, dy = x - x.mean(0), y - y.mean(0)
    prior = 0.05
    return ((dx * dy).sum(0) + SLOPE * prior) / ((dx * dx).sum(0) + prior)
