"""A frozen weight in full precision, in nn.Linear's orientation (out, in) or that of GPT-2's Conv1D (in, out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scratch import scratch


@dataclass(frozen=True)
class PlainWeight:
    """A `FrozenWeight` that multiplies as it is; `transposed` says that `weight` is stored as (in, out)."""

    weight: torch.Tensor
    transposed: bool = False

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        weight = self._in(x.dtype)
        weight = weight if self.transposed else weight.T
        return x @ weight if addend is None else addend.addmm_(x, weight)

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        weight = self._in(gradient.dtype)
        return gradient @ (weight.T if self.transposed else weight)

    def _in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`: itself, or a converted copy in the scratch buffer (under autocast)."""
        if self.weight.dtype == dtype:
            return self.weight.detach()
        return scratch("weight", self.weight.shape, dtype, self.weight.device).copy_(self.weight.detach())
