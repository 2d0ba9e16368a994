"""The set head's tilt lambda(h) = a h + b that holds its rate in every family of texts and text, at little more KL.

A set token calls for more of them, so a rate that holds on average is met by many texts without one and a few of
nothing else, and it climbs as texts grow. So the teacher has one moment a family f, E_f[m] = R for the mass m on the
set, and a bound for each *piece*, n positions in a row of one text. The distribution nearest to the base (the
I-projection) is then the base tilted in piece b of family f by

    lambda_b = min(mu_f, kappa_b),     kappa_b = the tilt that gives piece b the rate R by itself, plus EXCESS,

with mu_f from the moment: a text that has come to say little else is held back, and others are left to differ.

A head does not see pieces, it sees states h. Near the teacher its KL from it is v (lambda - lambda_b)^2 / 2 a position,
v = m (1 - m), so of all heads the nearest is the weighted least-squares fit

    (a, b) = argmin  sum_i v_i ((a, b) x_i - lambda_b(i))^2 + rho |a|^2,     x = (h, 1),

moved along the fit of a constant until the mean rate over all contexts is R: least squares alone shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tilt import Atoms, bounded_tilts, piece_tilts, solve_rates, tilted_atoms

EXCESSES = (0.0, 0.15, 0.3, 0.6, 1.0)
"""Log-odds by which a piece may exceed R, of which the first is taken that costs little. 0 holds R in every piece;
without a bound texts run away."""
MOST_PRICE = 1.12
"""What is little: the head's KL over that of one constant with the same mean rate."""
RIDGE = 1e-2
"""rho, in units of the mean of the diagonal of sum v x x^T."""
OLDER = 0.5
"""Weight of a round's contexts, once a head nearer the rate has written others."""

NEVER = 1e-7
"""A rate below it is that of a set whose logits are suppressed."""


@dataclass(frozen=True)
class Contexts:
    """B pieces of texts of one family, n positions each.

    Attributes:
        states: h, (B, n, D), bf16 to save memory.
        masses: (B, n, P), the base's masses of the atoms there, float32.
    """

    states: torch.Tensor
    masses: torch.Tensor

    def tilts(self, direction: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Of a head a (K, D), b (K,) at every position, (B n, K) float32."""
        return self.states.flatten(0, 1).float() @ direction.float().T + offset.float()

    def tilted(self, tilts: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        """Masses of the atoms (B n, P) under tilts (B n, K) or (K,), float64."""
        return (self.masses.flatten(0, 1).double().log() + tilts.double() @ patterns.T).softmax(1)


@dataclass(frozen=True)
class Price:
    """What heads cost in the same contexts, F families, K sets; KL in nats per token, means over the families.

    Attributes:
        teacher: lambda_f (F, K), one constant a family, with the head's rate in each; its KL is `kl_of_teacher`.
        constant: the one lambda (K,) with the head's mean rate over all families; its KL is `kl_of_constant`.
        rates_of_constant: (F, K).
        kl: of the head.
    """

    teacher: torch.Tensor
    constant: torch.Tensor
    rates_of_constant: torch.Tensor
    kl: float
    kl_of_teacher: float
    kl_of_constant: float

    @property
    def ratio(self) -> float:
        """The KL over that of the one constant."""
        return self.kl / self.kl_of_constant if self.kl_of_constant > 1e-9 else 1.0


class HeadFitter:
    """Fits heads to all contexts that were added, round by round.

    Args:
        atoms: of K sets.
        rates: wanted R (K,).
        intercept: whether the head has an offset b; without one it finds, among the states, what they have in common.
    """

    def __init__(self, atoms: Atoms, rates: Sequence[float], *, intercept: bool) -> None:
        self._atoms, self._rates = atoms, torch.tensor(list(rates), dtype=torch.float64)
        self._intercept = intercept
        self._rounds: list[Sequence[Contexts]] = []

    def add(self, families: Sequence[Contexts]) -> None:
        """Contexts of every family, as many positions of each."""
        if not self._rounds:  # the first round sets the units
            states = torch.cat([family.states.flatten(0, 1)[:: len(families)].float() for family in families])
            self._center = states.mean(0) if self._intercept else torch.zeros(states.shape[1])
            self._unit = float((states - self._center).square().mean().sqrt().clamp(min=1e-12))
        self._rounds.append(families)

    def aim(self, rates: torch.Tensor) -> None:
        """Fit the heads from here on to rates (F, K), of every family its own, in place of the wanted ones."""
        self._rates = rates

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """a (K, D) and b (K,) of the head that holds pieces as tightly as costs little in the newest contexts."""
        for excess in EXCESSES:
            head = self.with_excess(excess)
            if price(self._rounds[-1], self._atoms, *head).ratio <= MOST_PRICE:
                break
        return head

    def with_excess(self, excess: float) -> tuple[torch.Tensor, torch.Tensor]:
        """a (K, D) and b (K,) of the head nearest the teacher, with the wanted rates on average over the contexts."""
        size, parts = len(self._center), self._weighted()
        gram, of_tilt, of_one = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for weight, family, rates in parts:  # one after the other: a wide model's are large
            each = self._moments(family, rates, excess)
            gram, of_tilt, of_one = gram + weight * each[0], of_tilt + weight * each[1], of_one + weight * each[2]
        for part in gram:
            part.diagonal()[:size] += RIDGE * part.diagonal()[:size].mean()
        fit = torch.linalg.solve(gram, of_tilt.unsqueeze(2)).squeeze(2)
        constant = torch.linalg.solve(gram, of_one.unsqueeze(2)).squeeze(2)  # the fit of lambda_b = 1
        return self._unscaled(self._at_the_rate(fit, constant))

    def _weighted(self) -> list[tuple[float, Contexts, torch.Tensor]]:
        """Every family's contexts of every round, their weight and the family's rates (K,); weights sum to 1."""
        weights, count = [OLDER**age for age in reversed(range(len(self._rounds)))], len(self._rounds[0])
        total, rates = sum(weights) * count, self._rates.expand(count, -1)
        pairs = zip(weights, self._rounds, strict=True)
        return [(weight / total, *part) for weight, families in pairs for part in zip(families, rates, strict=True)]

    def _moments(
        self, family: Contexts, rates: torch.Tensor, excess: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """E[v x x^T] (K, D', D'), E[v x lambda_b] and E[v x] (K, D') of a family with its rates (K,), float64."""
        masses, patterns = family.masses.double(), self._atoms.patterns
        bounds = piece_tilts(masses, patterns, rates) + excess
        tilts = bounded_tilts(masses, patterns, rates, bounds)
        tilts = tilts.repeat_interleave(family.states.shape[1], dim=0)
        x, m = self._inputs(family), family.tilted(tilts, patterns) @ patterns
        v = torch.where(rates > 0, m * (1 - m), 1.0).float() / len(m)  # 0 needs its tilt everywhere
        grams, of_tilt, of_one = [], [], []
        for weight, tilt in zip(v.T, tilts.T.float(), strict=True):
            vx = weight[:, None] * x
            grams.append((vx.T @ x).double())
            of_tilt.append((vx.T @ tilt).double())
            of_one.append(vx.sum(0).double())
        return torch.stack(grams), torch.stack(of_tilt), torch.stack(of_one)

    def _inputs(self, family: Contexts) -> torch.Tensor:
        """x = ((h - center) / unit, 1), or h / unit; (B n, D')."""
        x = (family.states.flatten(0, 1).float() - self._center) / self._unit
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self._intercept else x

    def _at_the_rate(self, fit: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        """fit + s constant (K, D') with the s (K,) at which the mean rates are the wanted ones, by Newton's method."""
        lines, level = [], torch.zeros(len(fit), dtype=torch.float64)
        wanted = level.clone()
        for weight, family, own in self._weighted():
            x = self._inputs(family)
            lines.append((weight, family, x @ fit.T.float(), x @ constant.T.float()))
            wanted += weight * own
        for _ in range(30):
            rates, slopes = torch.zeros_like(level), torch.zeros_like(level)
            for weight, family, start, along in lines:
                m = family.tilted(start + along * level.float(), self._atoms.patterns) @ self._atoms.patterns
                rates += weight * m.mean(0)
                slopes += weight * (m * (1 - m) * along).mean(0)
            step = (torch.logit(wanted) - torch.logit(rates)) * rates * (1 - rates) / slopes
            step = torch.where(wanted > 0, step, 0.0).clamp(-1, 1)
            level = level + step
            if step.abs().max() < 1e-4:
                break
        return fit + level[:, None] * constant

    def _unscaled(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b on the states themselves."""
        size = len(self._center)
        direction = coefficients[:, :size] / self._unit
        if not self._intercept:
            return direction.float(), torch.zeros(len(direction))
        return direction.float(), (coefficients[:, size] - direction @ self._center.double()).float()


def price(families: Sequence[Contexts], atoms: Atoms, direction: torch.Tensor, offset: torch.Tensor) -> Price:
    """What a head costs in contexts, beside constants with the same rates there."""
    patterns, masses = atoms.patterns, [family.masses.flatten(0, 1).double() for family in families]
    tilts = [family.tilts(direction, offset) for family in families]
    rates = [(family.tilted(tilt, patterns) @ patterns).mean(0) for family, tilt in zip(families, tilts, strict=True)]
    teacher = [solve_rates(m, patterns, _silenced(r)) for m, r in zip(masses, rates, strict=True)]
    constant = solve_rates(torch.cat(masses), patterns, _silenced(torch.stack(rates).mean(0)))
    plain = [tilted_atoms(m, patterns, constant) @ patterns for m in masses]
    return Price(
        torch.stack(teacher), constant, torch.stack([m.mean(0) for m in plain]),
        *(_mean_kl(families, patterns, each) for each in (tilts, teacher, [constant] * len(masses))),
    )  # fmt: skip


def _silenced(rates: torch.Tensor) -> list[float]:
    """Rates (K,) with an exact 0 for a set that is never wanted."""
    return [rate if rate > NEVER else 0.0 for rate in rates.tolist()]


def _mean_kl(families: Sequence[Contexts], patterns: torch.Tensor, tilts: Sequence[torch.Tensor]) -> float:
    """KL(q || p) per token under a tilt for every family, mean over the families."""
    total = 0.0
    for family, tilt in zip(families, tilts, strict=True):
        q, p = family.tilted(tilt, patterns), family.masses.flatten(0, 1).double()
        total += float(torch.special.xlogy(q, q / p).sum(1).mean())
    return total / len(families)
