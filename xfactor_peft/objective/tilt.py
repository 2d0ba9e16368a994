"""The exponential tilt: its mass, its price, and the strength that gives a wanted rate.

With F_k(i) = 1[i in S_k], one context c, and base probabilities p:

    q(i|c) = p(i|c) exp(sum_k lambda_k F_k(i)) / Z(c),        Z(c) = sum_i p(i|c) exp(sum_k lambda_k F_k(i))

Over contexts, lambda is the unconstrained minimum of the convex dual  mean_c log Z(c) - sum_k lambda_k R_k,
whose gradient is  mean_c q(S_k|c) - R_k: the rates are met exactly, and among all distributions that meet them
q has the smallest mean KL(q || p) (the I-projection; Csiszar 1975, and for language models Khalifa et al. 2021,
"A Distributional Approach to Controlled Text Generation", arXiv:2012.11635).

Only the total mass of each *atom* matters, the tokens that belong to the same sets; there are at most 2^K of them,
so a context is P <= 2^K numbers instead of V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import XFactorError

SUPPRESS = -20.0
"""The strength that stands for "never": mass falls by exp(-20), a factor of 2e-9."""

MAX_STRENGTH = 60.0
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Atoms:
    """The partition of the vocabulary by membership in K sets.

    Attributes:
        of_token: (V,) long, the atom of every token.
        patterns: (P, K) float64, which sets an atom belongs to.
    """

    of_token: torch.Tensor
    patterns: torch.Tensor

    @classmethod
    def of(cls, members: torch.Tensor) -> Atoms:
        """From membership (K, V), bool or 0/1."""
        patterns, of_token = torch.unique(members.T.double(), dim=0, return_inverse=True)
        return cls(of_token, patterns)

    def masses(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """(N, V) log-probabilities -> (N, P) float64 masses of the atoms; log-probabilities need not sum to 1."""
        p = log_probabilities.exp()
        return (p @ F.one_hot(self.of_token.to(p.device), len(self.patterns)).to(p.dtype)).double()


def tilted_atoms(masses: torch.Tensor, patterns: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Atom masses under the tilt: (N, P), (P, K), (K,) -> (N, P), rows summing to 1."""
    return (masses.log() + patterns @ strengths).softmax(dim=1)


def solve_rates(masses: torch.Tensor, patterns: torch.Tensor, rates: list[float]) -> torch.Tensor:
    """The strengths (K,) with mean tilted masses `rates`, by damped Newton on the convex dual.

    Sets may overlap. A rate of 0 fixes that set's strength at `SUPPRESS`; the others are solved given it.

    Args:
        masses: (N, P), base masses of the atoms in N contexts.
        patterns: (P, K), `Atoms.patterns`.
        rates: K wanted rates.

    Raises:
        XFactorError: a set with a rate above 0 has no mass in the contexts, or no tilt meets all rates together (e.g.
            disjoint sets whose rates sum to 1 or more).
    """
    goal = torch.tensor(rates, dtype=torch.float64)
    free = goal > 0
    strengths = torch.full_like(goal, SUPPRESS)
    if not free.any():
        return strengths
    masses, inside = masses.double(), patterns[:, free]
    if not ((masses @ inside).amax(0) > 0).all():
        raise XFactorError("the model gives the set no mass at all, so no tilt can reach a rate; choose another set")
    masses = masses.clamp(min=1e-300)

    def dual(values: torch.Tensor) -> torch.Tensor:
        strengths[free] = values
        return (masses.log() + patterns @ strengths).logsumexp(1).mean() - (values * goal[free]).sum()

    values = torch.zeros(int(free.sum()), dtype=torch.float64)
    for _ in range(200):
        best = dual(values)
        q = tilted_atoms(masses, patterns, strengths)
        means = q @ inside
        gradient = means.mean(0) - goal[free]
        if gradient.abs().max() < _TOLERANCE:
            break
        hessian = (torch.einsum("np,pk,pl->kl", q, inside, inside) - means.T @ means) / len(q)
        hessian.diagonal().add_(1e-12)
        step = torch.linalg.solve(hessian, gradient)
        step *= min(1.0, 3.0 / float(step.abs().max()))
        while dual(values - step) > best and step.abs().max() > 1e-12:
            step = step / 2
        values = values - step
    strengths[free] = values
    if values.abs().max() > MAX_STRENGTH or gradient.abs().max() > 1e-4:
        wanted = ", ".join(f"{r:g}" for r in rates)
        raise XFactorError(
            f"no tilt gives the rates {wanted} together: a token counts for every set it is in, so rates of "
            "disjoint sets must sum to less than 1 and a set's rate cannot exceed that of one that holds it"
        )
    return strengths


def piece_tilts(masses: torch.Tensor, patterns: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """The strengths (B, K) that give each of B pieces of n positions the rates (K,) by itself; `SUPPRESS` for 0.

    Masses are (B, n, P), all above 0.
    """
    return _in_small_steps(rates, len(masses), lambda tilts: _tilted_rates(masses, patterns, tilts))


def bounded_tilts(
    masses: torch.Tensor, patterns: torch.Tensor, rates: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """min(mu, bounds) (B, K) with the mu (K,) at which all pieces together have the rates (K,); `SUPPRESS` for 0."""

    def measure(mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, slope = _tilted_rates(masses, patterns, torch.minimum(mu, bounds))
        return mean.mean(0, keepdim=True), torch.where(mu < bounds, slope, 0.0).mean(0, keepdim=True)

    mu = _in_small_steps(rates, 1, measure)
    return torch.where(rates > 0, torch.minimum(mu, bounds), SUPPRESS)


def _tilted_rates(
    masses: torch.Tensor, patterns: torch.Tensor, tilts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[m] and E[m (1 - m)] (B, K) in each piece under its tilt (B, K)."""
    m = (masses.log() + (tilts @ patterns.T)[:, None]).softmax(2) @ patterns
    return m.mean(1), (m * (1 - m)).mean(1)


def _in_small_steps(
    rates: torch.Tensor, rows: int, measure: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Strengths (rows, K) at which `measure` gives the rates: Newton's method in log-odds, in steps of falling size.

    All sets at once, as in Jacobi's method, which converges because a set's own strength moves its rate most.
    """
    strengths = torch.where(rates > 0, 0.0, SUPPRESS).double().expand(rows, -1)
    for index in range(60):
        mean, slope = measure(strengths)
        mean = mean.clamp(1e-15, 1 - 1e-15)
        step = (torch.logit(rates) - torch.logit(mean)) / (slope / (mean * (1 - mean))).clamp(min=1e-3)
        most = 4 * 0.85**index
        step = torch.where(rates > 0, step, 0.0).clamp(-most, most)
        strengths = (strengths + step).clamp(-MAX_STRENGTH, MAX_STRENGTH)
    return strengths
