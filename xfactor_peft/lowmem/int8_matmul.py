"""Products with an int8 weight as int8 matrix products: rows of x quantised on the fly, outlier columns kept apart.

    x_mi = q_mi a_m / 127 + outliers,    a_m = max_i |x_mi|  over columns that are not outliers
    (x W^T)_mo = (q CB^T)_mo  a_m SCB_o / 127^2  +  outlier columns in x's own dtype
    (g W)_mi   = (p CB)_mi    c_m / 127          +  outlier columns,     p, c: rows of g SCB / 127, quantised

A column is an outlier when it holds an entry beyond `CREST` times the root mean square of its row: one such entry
would set the scale of its whole row and push the others to zero. Trained transformers have a few such columns, the
same in almost every row (Dettmers et al. 2022, arXiv:2208.07339, section 3). With crest factor c the relative error
of a row is about c / (127 sqrt(12)), 2 % at c = 10.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from .scratch import scratch

CREST = 10.0
FEW_ROWS = 4
"""Up to here a product is bound by reading the weight, and activations stay as they are."""
FEW_ROWS_STEP = 64
"""`few_rows` needs a width that this divides: torch's kernel reads whole vectors (16 with AVX-512) unchecked."""
WEIGHT_FIRST = 2048
"""Where this divides the inner width and `16 rows` are within it, the weight is the left factor. oneDNN copies the
right one into an order of its own for every product, and rows a power of two apart push each other out of the
cache meanwhile: 1.6 ms against 0.45 for 16 rows times 1024 x 4096, 6.5 against 5.7 for 256."""
PRODUCT_BYTES = 16 * 2**20
"""Rows go through in pieces of at most this many bytes of int32 products."""

MODE = os.environ.get("XFACTOR_INT8_MATMUL", "auto")
"""auto: where the CPU is fast at it; on; forward, which leaves gradients to a dequantised weight; or off."""


@cache
def supported() -> bool:
    """Whether this CPU multiplies int8 faster than bf16: VNNI or AMX, through oneDNN.

    Without VNNI `torch._int_mm` is a scalar loop.
    """
    if not (hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available()):
        return False
    flags = ("_is_avx512_vnni_supported", "_is_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, flag, bool)() for flag in flags)


def enabled(x: torch.Tensor, *, backward: bool = False) -> bool:
    """Whether products with `x` go through int8: a CPU tensor of at most 32 bits, and the mode allows it."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or MODE == "off" or (backward and MODE == "forward"):
        return False
    return MODE != "auto" or supported()


def takes_few_rows(x: torch.Tensor) -> bool:
    """Whether `few_rows` may have x, (M, in)."""
    return x.dtype == torch.bfloat16 and x.shape[1] % FEW_ROWS_STEP == 0


def few_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x W^T for a handful of bf16 rows without quantising x; (M, in) -> (M, out). For decoding.

    torch's kernel is fast with bf16 alone (its float32 twin is a scalar loop), and its scales would be rounded to bf16,
    so they are applied here.
    """
    y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, torch.ones(len(scales), dtype=x.dtype))
    return (y.float() * (scales / 127)).to(x.dtype)


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    """x W^T, or addend + x W^T in the storage of `addend`; (M, in) -> (M, out) in x's dtype."""
    y = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype) if addend is None else addend
    column = scales / 127
    for rows in _pieces(x.shape[0], codes.shape[0]):
        q, row_scale, outliers = _quantize(x[rows], None)
        z = _forward_product(q, codes).mul_(column)
        if addend is None:
            z.mul_(row_scale)
        else:
            torch.addcmul(scratch("addend", z.shape, z.dtype).copy_(y[rows]), z, row_scale, out=z)
        if outliers is not None:
            index, values = outliers
            z.addmm_(values, (codes[:, index].float() * column[:, None]).T)
        y[rows] = z
    return y


def transposed_product(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """g W; (M, out) -> (M, in) in g's dtype."""
    y = torch.empty(gradient.shape[0], codes.shape[1], dtype=gradient.dtype)
    column = scales / 127
    for rows in _pieces(gradient.shape[0], max(codes.shape)):
        p, row_scale, outliers = _quantize(gradient[rows], column)
        z = _int_product(p, codes)
        z.mul_(row_scale)
        if outliers is not None:
            index, values = outliers
            z.addmm_(values, codes[index].float())
        y[rows] = z
    return y


def _pieces(rows: int, width: int) -> list[slice]:
    step = max(64, PRODUCT_BYTES // (4 * width) // 64 * 64)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _forward_product(q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """q CB^T: int8 (M, K) and (N, K) -> float32 (M, N) in a scratch buffer."""
    (rows, width), outputs = q.shape, len(codes)
    if width % WEIGHT_FIRST or 16 * rows > width:
        return _int_product(q, codes.T)
    product = torch._int_mm(codes, q.T, out=scratch("product", (outputs, rows), torch.int32))
    return scratch("float", (rows, outputs), torch.float32).copy_(product.T)


def _int_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int8 (M, K) and (K, N) -> float32 (M, N) in a scratch buffer."""
    shape = (left.shape[0], right.shape[1])
    if left.shape[1] == 1:  # `torch._int_mm` (2.13) reads past the end; a gate with one output has such a gradient
        return left.float() * right.float()
    product = torch._int_mm(left, right, out=scratch("product", shape, torch.int32))
    return scratch("float", shape, torch.float32).copy_(product)


def _quantize(
    x: torch.Tensor, column: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Rows of x (times `column`) -> codes in a scratch buffer, scales (M, 1), outliers (index, values) or None."""
    wide = scratch("float", x.shape, torch.float32).copy_(x)
    if column is not None:
        wide.mul_(column)
    # torch.aminmax and the maximum norm are 10 to 20 times slower here than these two reductions
    peak = torch.maximum(wide.amax(dim=1, keepdim=True), wide.amin(dim=1, keepdim=True).neg_())
    limit = torch.linalg.vector_norm(wide, dim=1, keepdim=True).mul_(CREST / x.shape[1] ** 0.5)
    outliers = None
    if (peak > limit).any():
        outliers = _take_outliers(wide, limit)
        peak = wide.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, 0)
    codes = scratch("codes", x.shape, torch.int8).copy_(wide.mul_(inverse).round_())
    return codes, peak / 127, outliers


def _take_outliers(wide: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the outlier columns of `wide` out, at most a 16th of all: (index, values (M, k)); they become 0 in place."""
    excess = (wide.abs() / limit.clamp(min=torch.finfo(torch.float32).tiny)).amax(dim=0)
    most = max(1, wide.shape[1] // 16)
    ratio, index = excess.topk(most)
    index = index[ratio > 1]
    values = wide[:, index]
    wide[:, index] = 0
    return index, values
