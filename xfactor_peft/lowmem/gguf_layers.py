"""Layers whose weights stay packed as in a GGUF file, mapped from it, and are unpacked a piece of rows at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from .fused_lora import frozen_linear
from .gguf_formats import Format
from .quantized import QuantizedLinear
from .scratch import scratch

PIECE = 2**21
"""Weights of a product's piece: this many at most are unpacked at the same time."""


@dataclass(frozen=True)
class PackedMatrix:
    """W (rows, columns), packed; a `FrozenWeight` that also says what a tensor says of its shape.

    Attributes:
        packed: uint8 (rows, bytes of a row).
        dtype: that of the model's computations.
        pairs: None, or the number of heads whose rows the file has in llama.cpp's order: the rotary halves
            interleaved, (heads, width / 2, 2). Outputs are put in order instead of rows, so nothing is copied.
    """

    packed: torch.Tensor
    form: Format
    columns: int
    dtype: torch.dtype
    pairs: int | None = None
    requires_grad = False

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.columns

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids` (n,), unpacked, (n, columns)."""
        out = torch.empty(len(ids), self.columns, dtype=self.dtype)
        return self.form.unpack_into(out, self.packed.index_select(0, ids))

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """W as a new tensor, with its rows in order."""
        whole = self.form.unpack_into(torch.empty(*self.shape, dtype=dtype), self.packed)
        return self._ordered(whole.T).T.contiguous() if self.pairs else whole

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        """x W^T, or addend + x W^T in the storage of `addend`; (M, columns) -> (M, rows)."""
        y = torch.empty(len(x), len(self), dtype=x.dtype) if addend is None or self.pairs else addend
        for part, weight in self.pieces(x.dtype):
            if y is addend:
                y[:, part].addmm_(x, weight.T)
            else:
                torch.mm(x, weight.T, out=y[:, part])
        if not self.pairs:
            return y
        return self._ordered(y) if addend is None else addend.add_(self._ordered(y))

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """g W; (M, rows) -> (M, columns)."""
        if self.pairs:
            gradient = gradient.view(len(gradient), self.pairs, 2, -1).transpose(2, 3).reshape(gradient.shape)
        shares = (gradient[:, part] @ weight for part, weight in self.pieces(gradient.dtype))
        y = next(shares)
        wide = torch.promote_types(y.dtype, torch.float32)
        for share in shares:
            y = y.to(wide).add_(share)
        return y.to(gradient.dtype)

    def _ordered(self, y: torch.Tensor) -> torch.Tensor:
        """(M, rows) in the file's order -> in transformers' order: one half of every head, then the other."""
        assert self.pairs is not None
        return y.reshape(len(y), self.pairs, -1, 2).transpose(2, 3).reshape(y.shape)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the file and their weights, one piece after the other, each in the buffer of the one before."""
        step = max(1, PIECE // self.columns)
        for start in range(0, len(self), step):
            packed = self.packed[start : start + step]
            weight = scratch("weight", (len(packed), self.columns), dtype, packed.device)
            yield slice(start, start + len(packed)), self.form.unpack_into(weight, packed)


class GgufLinear(QuantizedLinear):
    """A frozen linear layer with a packed weight, (out, bytes of a row); also an output embedding."""

    scale_name = ""

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None = None, *, from_conv1d: bool = False) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.from_conv1d, self._matrix = from_conv1d, matrix
        self.weight = nn.Parameter(matrix.packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    @property
    def matrix(self) -> PackedMatrix:
        return self._matrix

    def _allocate(self) -> None:
        raise NotImplementedError("a packed layer is made from a file's tensor")

    def quantize_(self, weight: torch.Tensor) -> None:
        raise ValueError(
            f"{self._matrix.form.name} weights of a GGUF file are read, not written: nothing merges into them"
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._matrix.unpacked(dtype)

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        return self._matrix.product(x, addend)

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._matrix.transposed_product(gradient)

    def codes(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]  # scales are among the codes
        return (self.weight.data,)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        return nn.Module._apply(self, fn, recurse)  # bytes have no dtype to change


class GgufEmbedding(nn.Embedding):
    """Rows of a packed matrix, times `scale` where there is one; the file's bytes are its `weight`."""

    def __init__(self, matrix: PackedMatrix, padding_idx: int | None, scale: float | None = None) -> None:
        nn.Module.__init__(self)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx, self.matrix = padding_idx, matrix
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = nn.Parameter(matrix.packed, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.matrix.rows(ids.reshape(-1)).view(*ids.shape, -1)
        return rows if self.scale is None else rows.mul_(self.scale)


def read_pages(model: nn.Module) -> None:
    """Touch every page of the model's packed weights: a mapped file is in memory only where it was read."""
    for weight in model.parameters():
        if weight.dtype is torch.uint8:
            weight.view(-1)[:: mmap.PAGESIZE].sum()


def linear(x: torch.Tensor, weight: torch.Tensor | PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear for a tensor or a packed matrix; (..., D) -> (..., V)."""
    return nn.functional.linear(x, weight, bias) if isinstance(weight, torch.Tensor) else frozen_linear(x, weight, bias)
