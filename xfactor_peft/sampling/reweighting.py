"""Rates at tilts that were never sampled, from samples at tilts that were.

For one set S, m_0(c) the base's mass on it in context c, and the tilt by lambda:

    m_lambda = m_0 e^lambda / Z_lambda(c),      Z_lambda(c) = 1 - m_0 + m_0 e^lambda,
    log q_lambda(x|c) / p(x|c) = lambda 1[x in S] - log Z_lambda(c)

so what a text weighs under another lambda is known exactly from its masses. Texts from several lambda_j are weighed
against their mixture (the balance heuristic; Veach and Guibas 1995), and a position by the tokens before it alone.
"""

from __future__ import annotations

import torch


class TiltedSamples:
    """Texts sampled under tilts of one set, and the expected rate under any other tilt near them."""

    def __init__(self) -> None:
        self._strengths: list[float] = []
        self._base_logits: list[torch.Tensor] = []
        self._hits: list[torch.Tensor] = []

    def add(self, strength: float, masses: torch.Tensor, hits: torch.Tensor) -> None:
        """Texts sampled at `strength`: (N, T) masses m_strength(c) and whether each token is in S, (N, T)."""
        self._strengths.append(strength)
        self._base_logits.append(torch.logit(masses.double().clamp(1e-12, 1 - 1e-12)) - strength)
        self._hits.append(hits.double())

    def rate(self, strength: float) -> float:
        """The expected rate of samples at `strength`."""
        logits, hits = torch.cat(self._base_logits), torch.cat(self._hits)
        target = _log_weights(logits, hits, strength)
        sizes = torch.tensor([len(part) for part in self._hits], dtype=torch.float64).log()
        proposals = torch.stack([_log_weights(logits, hits, other) for other in self._strengths], dim=-1)
        weights = (target - (proposals + sizes).logsumexp(-1)).softmax(0)
        return float((weights * torch.sigmoid(logits + strength)).sum(0).mean())


def _log_weights(logits: torch.Tensor, hits: torch.Tensor, strength: float) -> torch.Tensor:
    """log q_strength / p of the tokens before every position, (N, T)."""
    mass = torch.sigmoid(logits)
    steps = strength * hits - torch.log1p(mass * torch.expm1(torch.tensor(strength, dtype=torch.float64)))
    return steps.cumsum(1) - steps
