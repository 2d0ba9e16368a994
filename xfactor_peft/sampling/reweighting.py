"""Rates at tilts that were never sampled, from samples at tilts that were.

With p_a(c) the base's mass on atom a in context c (`objective.tilt`), F_a its pattern, and the tilt by lambda:

    m_lambda,a = p_a exp(lambda . F_a) / Z_lambda(c),      Z_lambda(c) = sum_a p_a exp(lambda . F_a),
    log q_lambda(x|c) / p(x|c) = lambda . F(x) - log Z_lambda(c)

so what a text weighs under another lambda is known exactly from its masses. Texts from several lambda_j are weighed
against their mixture (the balance heuristic; Veach and Guibas 1995), and a position by the tokens before it alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..objective.tilt import MAX_STRENGTH

SLOPE = 1.2
"""Log-odds of a sampled rate for one of lambda: not 1, since what raises a set makes it likelier in what follows."""


def log_odds(rates: torch.Tensor) -> torch.Tensor:
    """ln(r / (1 - r)), float64, finite also at 0 and 1."""
    return torch.logit(rates.double().clamp(1e-9, 1 - 1e-9))


@dataclass(frozen=True)
class Estimate:
    """Expected rates (K,) under a tilt.

    Attributes:
        errors: standard errors (K,) of their log-odds.
        texts: how many texts, drawn under this tilt, would say as much; of the position where they are fewest.
    """

    rates: torch.Tensor
    errors: torch.Tensor
    texts: float


class TiltedSamples:
    """Texts sampled under tilts of K sets, and the expected rates under any other tilt near them.

    Args:
        patterns: (P, K), `Atoms.patterns`.
    """

    def __init__(self, patterns: torch.Tensor) -> None:
        self._patterns = patterns
        self._strengths: list[torch.Tensor] = []
        self._base: list[torch.Tensor] = []
        self._atoms: list[torch.Tensor] = []

    def capture(self) -> dict[str, list[torch.Tensor]]:
        """All texts, from which `restore` makes the same samples again."""
        return {"strengths": self._strengths, "base": self._base, "atoms": self._atoms}

    def restore(self, texts: dict[str, list[torch.Tensor]]) -> None:
        """Hold the captured texts, and no others."""
        self._strengths, self._base, self._atoms = (list(texts[name]) for name in ("strengths", "base", "atoms"))

    def add(self, strengths: torch.Tensor, masses: torch.Tensor, atoms: torch.Tensor) -> Estimate:
        """Texts sampled at `strengths` (K,): (N, T, P) tilted masses m(c), and the atom of each token, (N, T).

        Returns what these texts alone say of their own tilt.
        """
        tilt = self._patterns @ strengths
        base = (masses.double().clamp(min=1e-30).log() - tilt).log_softmax(-1)
        self._strengths.append(strengths)
        self._base.append(base)
        self._atoms.append(atoms)
        return self._estimate(base, strengths, torch.full(atoms.shape, 1 / len(atoms), dtype=torch.float64))

    def estimate(self, strengths: torch.Tensor) -> Estimate:
        """The expected rates of samples at `strengths` (K,), from all texts; of no text where there are none."""
        if not self._atoms:
            unknown = torch.full_like(strengths, torch.nan)
            return Estimate(unknown, unknown, 0.0)
        base, atoms = torch.cat(self._base), torch.cat(self._atoms)
        target = self._log_weights(base, atoms, strengths)
        sizes = torch.tensor([len(part) for part in self._atoms], dtype=torch.float64).log()
        proposals = torch.stack([self._log_weights(base, atoms, other) for other in self._strengths], dim=-1)
        return self._estimate(base, strengths, (target - (proposals + sizes).logsumexp(-1)).softmax(0))

    def solve(self, wanted: torch.Tensor, start: torch.Tensor, rounds: int = 40) -> torch.Tensor:
        """The strengths (K,) at which the estimated rates are `wanted` (K,); those of a wanted 0 stay as they are.

        lambda += (logit wanted - logit R(lambda)) / SLOPE, which is between 1 and 1.4.
        """
        strengths, goal = start, log_odds(wanted)
        for _ in range(rounds):
            step = (goal - log_odds(self.estimate(strengths).rates)) / SLOPE
            step = torch.where(wanted > 0, step, 0.0).clamp(-1, 1)
            strengths = (strengths + step).clamp(-MAX_STRENGTH, MAX_STRENGTH)
            if step.abs().max() < 1e-4:
                break
        return strengths

    def _estimate(self, base: torch.Tensor, strengths: torch.Tensor, weights: torch.Tensor) -> Estimate:
        masses = (base + self._patterns @ strengths).softmax(-1) @ self._patterns  # (N, T, K)
        along = torch.einsum("nt,ntk->tk", weights, masses)
        rates = along.mean(0)
        influence = (weights[..., None] * (masses - along)).mean(1)  # of every text, (N, K)
        errors = influence.square().sum(0).sqrt() / (rates * (1 - rates)).clamp(min=1e-12)
        return Estimate(rates, errors, float(1 / weights.square().sum(0).max()))

    def _log_weights(self, base: torch.Tensor, atoms: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        """log q_lambda / p of the tokens before every position, (N, T)."""
        tilt = self._patterns @ strengths
        steps = tilt[atoms] - (base + tilt).logsumexp(-1)
        return steps.cumsum(1) - steps
