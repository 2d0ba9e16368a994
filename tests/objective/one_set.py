"""One set's tilt by itself: closed forms and bisection, the twin of `objective.tilt`'s atoms and Newton."""

from __future__ import annotations

import torch


def tilted_mass(mass: torch.Tensor, strength: float) -> torch.Tensor:
    """m e^lambda / (1 - m + m e^lambda)."""
    return torch.sigmoid(torch.logit(mass.double()) + strength)


def tilt_kl(mass: torch.Tensor, strength: float) -> torch.Tensor:
    """KL(q_lambda || p) in nats in each context."""
    m, q = mass.double(), tilted_mass(mass, strength)
    return torch.special.xlogy(q, q / m) + torch.special.xlogy(1 - q, (1 - q) / (1 - m))


def solve_rate(masses: torch.Tensor, rate: float) -> float:
    """The strength with mean tilted mass `rate`, by bisection; masses (N,)."""
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted_mass(masses, middle).mean() < rate else (low, middle)
    return (low + high) / 2
