"""The number formats of GGUF files, unpacked by torch operations on many blocks at a time.

A row of a matrix is whole blocks of 32 or 256 weights; in every format w = s_g q - m_g, with small whole numbers q and
a scale s_g (and a minimum m_g, or none) for each group of 16 or 32 weights. The layouts are those of llama.cpp's
ggml-common.h; the eager twin in the tests is `gguf.quants.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .scratch import scratch

PIECE = 2**19
"""Weights that are unpacked at a time, so that what is between stays in the processor's cache."""

Parts = tuple[torch.Tensor, torch.Tensor | None]
"""Scale and minimum of every group, float32 (n, groups)."""


@dataclass(frozen=True)
class Format:
    """One of ggml's types.

    Attributes:
        name: as ggml calls it, e.g. "Q4_K".
        weights: in a block.
        size: bytes of a block.
        codes: writes q of the blocks (n, size) uint8 into (n, weights) uint8 or int8, by the number of the format's
            half of a byte; None for plain floating-point numbers.
        scales: blocks -> `Parts`.
        plain: the dtype of plain numbers.
        offset: what is taken from every q, while it is a small whole number.
    """

    name: str
    weights: int
    size: int
    codes: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    scales: Callable[[torch.Tensor], Parts] | None = None
    plain: torch.dtype | None = None
    offset: int = 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; raises ValueError where it is not of whole blocks."""
        if columns % self.weights:
            raise ValueError(
                f"rows of {columns} weights are not whole blocks of {self.name}, which holds {self.weights}"
            )
        return columns // self.weights * self.size

    def unpack_into(self, out: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Write the weights of whole rows, (rows, bytes) uint8, into `out`, contiguous (rows, columns); returns it."""
        if self.plain is not None:
            return out.copy_(packed.view(self.plain))
        blocks, values = packed.reshape(-1, self.size), out.view(-1, self.weights)
        step = max(1, PIECE // self.weights)
        for piece, into in zip(blocks.split(step), values.split(step), strict=True):
            self._unpack(piece, into)
        return out

    def _unpack(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        assert self.codes is not None  # plain numbers are not unpacked
        assert self.scales is not None
        scale, minimum = self.scales(blocks)
        codes = scratch("gguf codes", out.shape, torch.int8, out.device)
        self.codes(blocks, codes.view(torch.uint8))
        if self.offset:
            codes.sub_(self.offset)
        exact = out if out.dtype in (torch.float32, torch.float64) else scratch("gguf values", out.shape, torch.float32)
        grouped = exact.copy_(codes).view(*scale.shape, -1)
        grouped.mul_(scale[..., None])
        if minimum is not None:
            grouped.sub_(minimum[..., None])
        if exact is not out:
            out.copy_(exact)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number at byte `start` of each block, float32 (n, 1)."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _each(number: int) -> int:
    """The signed 64-bit word whose eight bytes all are `number`, below 128."""
    return number * 0x0101010101010101


def _words(packed: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A copy of bytes (..., width), as whole words: what is done to a word is done to its bytes at the same time."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


def _nibbles(packed: torch.Tensor, codes: torch.Tensor) -> None:
    """(n, groups, width) bytes -> (n, groups, 2, width): the low halves, then the high ones."""
    words, halves = _words(packed), codes.view(torch.int64)
    torch.bitwise_and(words, _each(15), out=halves[:, :, 0])
    torch.bitwise_and(words.bitwise_right_shift_(4), _each(15), out=halves[:, :, 1])


def _add_high(codes: torch.Tensor, words: torch.Tensor, shift: int, bits: int) -> None:
    """Add 16 times the `bits` bits from `shift` on of every byte of `words`, int64, to `codes` (n, width), uint8."""
    codes.view(torch.int64).add_((words >> shift).bitwise_and_(_each(2**bits - 1)).bitwise_left_shift_(4))


def _legacy(quants: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Codes of Q4_0 and Q4_1: 16 bytes from `quants` on, weight i in the low and weight 16 + i in the high half."""

    def codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
        _nibbles(blocks[:, None, quants:], out.view(-1, 1, 2, 16))

    return codes


def _legacy5(high: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Codes of Q5_0 and Q5_1: as `_legacy`, with the fifth bits of the 32 weights in the 4 bytes from `high` on."""

    def codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
        _nibbles(blocks[:, None, high + 4 :], out.view(-1, 1, 2, 16))
        fifth = _fifth_bits().index_select(0, blocks[:, high : high + 4].reshape(-1).int())
        out.add_(fifth.view(torch.uint8).view(-1, 32))

    return codes


@cache
def _fifth_bits() -> torch.Tensor:
    """(256,) int64: eight bytes, each 16 where the bit of the index is set, else 0."""
    bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    return bits.bitwise_and_(1).bitwise_left_shift_(4).contiguous().view(torch.int64).flatten()


def _scale(blocks: torch.Tensor) -> Parts:
    """w = d (q - offset)."""
    return _half(blocks, 0), None


def _affine(blocks: torch.Tensor) -> Parts:
    """w = d q + m."""
    return _half(blocks, 0), -_half(blocks, 2)


def _q8_codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:])


def _k_scales(blocks: torch.Tensor) -> Parts:
    """Q4_K and Q5_K: eight scales and minima of six bits in twelve bytes, and a float16 for each kind."""
    first, second, rest = _words(blocks[:, 4:16], torch.int32).unbind(1)  # four groups to a word
    low = torch.stack([first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)], dim=1)
    minima = torch.stack([second & 0x3F3F3F3F, ((rest >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)], dim=1)
    return _half(blocks, 0) * low.view(torch.uint8), _half(blocks, 2) * minima.view(torch.uint8)


def _q4_k_codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 16:].view(-1, 4, 32), out.view(-1, 4, 2, 32))


def _q5_k_codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 48:].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    grouped, high = out.view(-1, 8, 32), _words(blocks[:, 16:48])
    for group in range(8):
        _add_high(grouped[:, group], high, group, 1)


def _q6_k_codes(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, :128].view(-1, 2, 64), out.view(-1, 2, 2, 64))
    quarters, high = out.view(-1, 2, 4, 32), _words(blocks[:, 128:192]).view(-1, 2, 4)
    for quarter in range(4):
        _add_high(quarters[:, :, quarter], high, 2 * quarter, 2)


def _q6_k_scales(blocks: torch.Tensor) -> Parts:
    return _half(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


FORMATS: dict[int, Format] = {
    0: Format("F32", 1, 4, plain=torch.float32),
    1: Format("F16", 1, 2, plain=torch.float16),
    30: Format("BF16", 1, 2, plain=torch.bfloat16),
    8: Format("Q8_0", 32, 34, _q8_codes, _scale),
    2: Format("Q4_0", 32, 18, _legacy(2), _scale, offset=8),
    3: Format("Q4_1", 32, 20, _legacy(4), _affine),
    6: Format("Q5_0", 32, 22, _legacy5(2), _scale, offset=16),
    7: Format("Q5_1", 32, 24, _legacy5(4), _affine),
    12: Format("Q4_K", 256, 144, _q4_k_codes, _k_scales),
    13: Format("Q5_K", 256, 176, _q5_k_codes, _k_scales),
    14: Format("Q6_K", 256, 210, _q6_k_codes, _q6_k_scales, offset=32),
}
"""By ggml's number of the type."""
BY_NAME = {form.name: form for form in FORMATS.values()}
