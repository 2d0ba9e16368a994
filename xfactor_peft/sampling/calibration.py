"""Samples of the adapted model, and the exact set masses along them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from ..objective.tilt import Atoms, solve_rate, solve_rates


@torch.no_grad()
def log_probabilities(policy: SplitModel, hidden: torch.Tensor, banned: torch.Tensor | None = None) -> torch.Tensor:
    """log softmax of a chunk of states, (n, D) -> (n, V) float32; banned ids get no probability."""
    z = policy.logits(hidden).float()
    if banned is not None and len(banned):
        z[:, banned] = float("-inf")
    return z.log_softmax(-1)


@torch.no_grad()
def atom_masses(
    policy: SplitModel, ids: torch.Tensor, start: int, atoms: Atoms, banned: torch.Tensor | None = None
) -> torch.Tensor:
    """Masses of the atoms at the positions that predict ids[:, start:], ((T - start) * N, P) float64.

    Their mean over the model's own samples is the rate with the sampling noise of each token averaged out exactly
    (Rao and Blackwell): E[1[x in S] | context] in place of 1[x in S].
    """
    parts = []
    step = chunk_positions(policy.weight.shape[0])
    for rows in ids.split(64):
        hidden = policy.hidden(rows.to(policy.weight.device))[:, start - 1 : -1].flatten(0, 1)
        parts += [
            atoms.masses(log_probabilities(policy, h, banned)).cpu() for h in hidden.split(step)
        ]  # fmt: skip
    return torch.cat(parts)


@dataclass
class Controller:
    """Finds the offset per set at which the sampled rates are the wanted ones: a secant in log-odds.

    Tilting by d moves the log-odds of the mass by d in a fixed context; on own samples contexts drift too, so the slope
    is not 1 and is learnt from round to round.
    """

    rates: torch.Tensor
    slope: torch.Tensor | None = None
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self, offset: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """The change of the offset (K,) after `measured` rates (K,) at `offset`; 0 for a wanted rate of 0."""
        odds = torch.logit(measured.double().clamp(1e-9, 1 - 1e-9))
        if self.slope is None:
            self.slope = torch.full_like(odds, 1.2)
        elif self.last is not None:
            moved, seen = offset - self.last[0], odds - self.last[1]
            known = moved.abs() > 1e-3
            self.slope = torch.where(known, (seen / moved.where(known, torch.ones(()).double())), self.slope)
            self.slope = self.slope.clamp(0.6, 5.0)
        self.last = (offset.clone(), odds)
        wanted = torch.logit(self.rates.double().clamp(1e-9, 1 - 1e-9))
        return torch.where(self.rates > 0, ((wanted - odds) / self.slope).clamp(-2, 2), 0.0)

    def met(self, measured: torch.Tensor) -> bool:
        """Within a fiftieth of every wanted rate, or 0.002."""
        return bool(((measured - self.rates).abs() <= (0.02 * self.rates).clamp(min=0.002)).all())


Trace = list[dict[str, list[float]]]


def calibrate(
    measure: Callable[[torch.Tensor, int], torch.Tensor],
    offset: torch.Tensor,
    rates: torch.Tensor,
    *,
    least: int = 3,
    most: int = 7,
) -> tuple[torch.Tensor, Trace]:
    """Find the offset (K,) at which the sampled rates (K,) are the wanted ones.

    `measure(offset, round)` samples afresh in every round, and all rounds count: near the goal the log-odds of the
    rate are a line in the offset, whose height is the mean over rounds; offsets far from the last one count less.
    So the error falls with the number of samples in all rounds, not with those of the last.

    Returns the offset and every round's pair.
    """
    wanted = torch.logit(rates.double().clamp(1e-9, 1 - 1e-9))
    free = rates > 0
    offsets, odds, trace = [], [], []
    for index in range(most):
        measured = measure(offset, index)
        trace.append({"offset": offset.tolist(), "rates": measured.tolist()})
        offsets.append(offset)
        odds.append(torch.logit(measured.double().clamp(1e-9, 1 - 1e-9)))
        x, y = torch.stack(offsets), torch.stack(odds)
        weights = 1 / (0.05**2 + (0.3 * (x - x[-1])) ** 2)
        slope = _slope(x, y)
        height = (weights * (y - slope * x)).sum(0) / weights.sum(0)
        following = torch.where(free, (wanted - height) / slope, offset)
        change = following - offset
        offset = offset + change.clamp(-2, 2)
        if index + 1 >= least and change.abs().max() < 0.04:
            break
    return offset, trace


def _slope(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Least-squares slope of each column, held near 1.2, which the drift of contexts makes of 1, by a weak prior."""
    dx, dy = x - x.mean(0), y - y.mean(0)
    prior = 0.05
    return ((dx * dy).sum(0) + 1.2 * prior) / ((dx * dx).sum(0) + prior)


def solve(masses: torch.Tensor, atoms: Atoms, rates: list[float]) -> torch.Tensor:
    """Strengths (K,) for the rates in fixed contexts: bisection for one set, Newton for several."""
    if len(rates) == 1:
        return torch.tensor([solve_rate(masses @ atoms.patterns[:, 0], rates[0])], dtype=torch.float64)
    return solve_rates(masses, atoms.patterns, rates)
