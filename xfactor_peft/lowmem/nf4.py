"""Linear layers with 4-bit NormalFloat weights, packed as bitsandbytes packs them.

    W_n = code[q_n] absmax_(n // 64),     n counts the entries of W row by row

q is 4 bits: the even entry of a pair in the high half of its byte. Dettmers et al. 2023, arXiv:2305.14314, section 3.
`weight` is uint8 (ceil(out in / 2), 1), `absmax` a float32 buffer (ceil(out in / 64),).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from . import nf4_kernel
from .nf4_kernel import CODE
from .quantized import QuantizedLinear
from .scratch import scratch

BLOCK = 64
_CELLS = 1024


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) floating point -> packed (ceil(n/2), 1) uint8 and absmax (ceil(n/64),) float32."""
    flat = weight.detach().reshape(-1).to(torch.float32)
    padded = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1 / absmax.clamp(min=1e-38))[:, None]
    q = _nearest(scaled.view(-1))[: len(flat)]
    q = F.pad(q, (0, len(q) % 2), value=7)  # 7 is the code of 0
    return ((q[::2] << 4) | q[1::2])[:, None], absmax


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code for values in [-1, 1], uint8; ties go down, as in bucketize but 3 times as fast.

    A grid of `_CELLS` cells is so fine that each holds at most one bound between codes: one look-up, one comparison.
    """
    below, bound = _grid()
    q = torch.empty(scaled.shape, dtype=torch.uint8)
    for values, index in zip(scaled.split(2**18), q.split(2**18), strict=True):
        cell = ((values + 1) * (_CELLS // 2)).to(torch.int32)
        torch.index_select(below, 0, cell, out=index)
        index += values > bound.index_select(0, cell)
    return q


@cache
def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell of [-1, 1]: how many bounds lie below it, uint8, and the next bound from there on."""
    code = torch.tensor(CODE, dtype=torch.float32)
    bounds = (code[:-1] + code[1:]) / 2
    below = torch.bucketize(torch.arange(_CELLS + 1, dtype=torch.float32) * (2 / _CELLS) - 1, bounds)
    return below.to(torch.uint8), torch.cat([bounds, bounds.new_tensor([torch.inf])])[below]


@cache
def _pairs(dtype: torch.dtype) -> torch.Tensor:
    """(256,) table from a byte to its two values in `dtype`, bit for bit in one integer of twice the width."""
    code = torch.tensor(CODE, dtype=dtype)
    byte = torch.arange(256)
    table = torch.stack([code[byte >> 4], code[byte & 15]], dim=1)
    wide = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return table.contiguous().view(wide).view(256)


def dequantize_into(out: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Write W into `out`, contiguous with a multiple of 64 entries beyond the last whole block; returns it flat."""
    table = _pairs(out.dtype).to(out.device)
    index = scratch("index", packed.shape[:1], torch.int32, out.device).copy_(packed[:, 0])
    torch.index_select(table, 0, index, out=out[: 2 * len(index)].view(table.dtype))
    out.view(-1, BLOCK).mul_(absmax.to(out.dtype)[:, None])
    return out


class NF4Linear(QuantizedLinear):
    """A frozen linear layer with 4-bit weights, dequantised into one scratch buffer for every product."""

    scale_name = "absmax"
    absmax: torch.Tensor

    def _allocate(self) -> None:
        entries = self.out_features * self.in_features
        self.weight = nn.Parameter(torch.empty((entries + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("absmax", torch.empty(-(-entries // BLOCK), dtype=torch.float32))

    def quantize_(self, weight: torch.Tensor) -> None:
        self.set_codes(*quantize_nf4(weight))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._in_scratch(dtype).clone()

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        weight = self._in_scratch(x.dtype)
        return x @ weight.T if addend is None else addend.addmm_(x, weight.T)

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ self._in_scratch(gradient.dtype)

    def _in_scratch(self, dtype: torch.dtype) -> torch.Tensor:
        """W in `dtype` in the scratch buffer, valid until the next layer dequantises."""
        shape = (self.out_features, self.in_features)
        flat = scratch("weight", (len(self.absmax) * BLOCK,), dtype, self.weight.device)
        kernel = nf4_kernel.compiled_kernel(dtype, self.weight.device)
        whole = shape[0] * shape[1] // BLOCK if kernel is not None else 0  # blocks; the rest is torch's
        if kernel is not None and whole:
            # Blocks run on from row to row, so any width may go as rows of one block: the kernel is wrong at others.
            columns = shape[1] if shape[1] % BLOCK == 0 else BLOCK
            kernel(self.weight, self.absmax, flat[: whole * BLOCK].view(-1, columns), BLOCK)
        if whole < len(self.absmax):
            rest = slice(whole * BLOCK // 2, None)
            dequantize_into(flat[whole * BLOCK :], self.weight[rest], self.absmax[whole:])
        return flat[: shape[0] * shape[1]].view(shape)
