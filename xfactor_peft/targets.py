"""What the model should say: target distributions over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import XFactorError
from .tokens import TokenSet


@dataclass(frozen=True)
class UniformTarget:
    """The two-level target: P(i) = alpha/Z for i in S, beta/Z for the others, Z = alpha |S| + beta (V - |S|).

    With beta = 0 it is uniform over S and zero elsewhere, whose optimum repeats S and nothing else.

    Raises:
        XFactorError: unless alpha > beta >= 0 and both are finite.
    """

    tokens: TokenSet
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.alpha) and math.isfinite(self.beta)
        if not (finite and self.alpha > self.beta >= 0):
            raise XFactorError(
                f"--alpha must be greater than --beta, and --beta at least 0; got {self.alpha:g} and {self.beta:g}"
            )

    @property
    def levels(self) -> tuple[float, float]:
        """(P(i) for i in S, P(i) for i not in S)."""
        size, others = len(self.tokens), self.tokens.vocab_size - len(self.tokens)
        total = self.alpha * size + self.beta * others
        return self.alpha / total, self.beta / total

    @property
    def set_mass(self) -> float:
        """P(S), the mass the target wants on the set."""
        return self.levels[0] * len(self.tokens)

    def probabilities(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """P as a float32 tensor of shape (V,), summing to 1."""
        inside, outside = self.levels
        mask = self.tokens.mask(device)
        return torch.where(mask, torch.tensor(inside, device=device), torch.tensor(outside, device=device))
