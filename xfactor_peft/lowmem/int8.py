"""Linear layers with int8 weights and one scale a row, in the format of bitsandbytes' LLM.int8().

    W_oi = CB_oi SCB_o / 127,     SCB_o = max_i |W_oi|,     CB = round(127 W / SCB)

Dettmers et al. 2022, arXiv:2208.07339, section 2. CB is `weight`, (out, in) int8; SCB is a float32 buffer (out,).
"""

from __future__ import annotations

import torch
from torch import nn

from . import int8_matmul
from .quantized import QuantizedLinear
from .scratch import scratch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) floating point -> CB (out, in) int8 and SCB (out,) float32. A row of zeros has SCB = 0."""
    weight = weight.detach().to(torch.float32)
    scales = weight.abs().amax(dim=1)
    inverse = torch.where(scales > 0, 127 / scales, 0)
    codes = (weight * inverse[:, None]).round_()
    return codes.to(torch.int8, memory_format=torch.contiguous_format), scales  # a Conv1D's weight comes transposed


class Int8Linear(QuantizedLinear):
    """A frozen linear layer with int8 weights.

    Where `int8_matmul.enabled` says so, products are int8 matrix products with the rows of x (and of the gradient)
    quantised on the fly; elsewhere, and for float64, W is dequantised into a scratch buffer.
    """

    scale_name = "SCB"
    SCB: torch.Tensor

    def _allocate(self) -> None:
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("SCB", torch.empty(self.out_features, dtype=torch.float32))

    def quantize_(self, weight: torch.Tensor) -> None:
        self.set_codes(*quantize_rows(weight))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (self.weight * (self.SCB.to(wide) / 127)[:, None]).to(dtype)

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        few = x.shape[0] <= int8_matmul.FEW_ROWS
        if not int8_matmul.enabled(x) or (few and not int8_matmul.takes_few_rows(x)):
            weight = self._in_scratch(x.dtype)
            return x @ weight.T if addend is None else addend.addmm_(x, weight.T)
        if few:
            y = int8_matmul.few_rows(x, self.weight, self.SCB)
            return y if addend is None else addend.add_(y)
        return int8_matmul.product(x, self.weight, self.SCB, addend)

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        if int8_matmul.enabled(gradient, backward=True):
            return int8_matmul.transposed_product(gradient, self.weight, self.SCB)
        # g W = (g SCB / 127) CB: scaling g is cheaper than scaling W, and CB is exact in every float dtype.
        scaled = gradient * self._row_factors(gradient.dtype)
        codes = scratch("weight", self.weight.shape, gradient.dtype, self.weight.device).copy_(self.weight)
        return scaled @ codes

    def _in_scratch(self, dtype: torch.dtype) -> torch.Tensor:
        """W in `dtype` in the scratch buffer, valid until the next layer dequantises."""
        weight = scratch("weight", self.weight.shape, dtype, self.weight.device).copy_(self.weight)
        return weight.mul_(self._row_factors(dtype)[:, None])

    def _row_factors(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.SCB.to(torch.promote_types(dtype, torch.float32)) / 127).to(dtype)
