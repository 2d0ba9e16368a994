"""Kernels that others wrote are right at every shape at which this package trusts them, against the definitions."""

from __future__ import annotations

import pytest
import torch

from xfactor_peft.lowmem import attention, int8_matmul, nf4_kernel
from xfactor_peft.lowmem.attention import LONGEST, ShortAttention, last_token_attention
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear

WIDTHS = range(1, 1101)
DTYPES = [torch.float32, torch.bfloat16]
# Appendix E of arXiv:2305.14314, typed in here: the library's own table is under test.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float64)  # fmt: skip


def defined(layer: NF4Linear) -> torch.Tensor:
    """W_n = code[q_n] absmax_(n // 64), in float64."""
    n = layer.out_features * layer.in_features
    byte = layer.weight[:, 0].long()
    q = torch.stack([byte >> 4, byte & 15], dim=1).flatten()[:n]
    return (NF4[q] * layer.absmax.double()[torch.arange(n) // 64]).view(layer.out_features, layer.in_features)


def nf4_layer(width: int) -> NF4Linear:
    """Rows of very different sizes, so that a scale of another block is seen."""
    generator = torch.Generator().manual_seed(width)
    rows = 1 + width % 5
    return NF4Linear.from_weight(
        torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator), None
    )


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [True, False])
def test_nf4_is_its_definition_at_every_width(dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(nf4_kernel, "compiled_kernel", lambda *_: None)
    elif nf4_kernel.compiled_kernel(dtype, torch.device("cpu")) is None:
        pytest.skip("this version of bitsandbytes has no kernel that was tried")
    wrong = {}
    for width in (*WIDTHS, 1536, 4096, 11008):
        layer = nf4_layer(width)
        error = distance(layer.dequantize(dtype), defined(layer))
        if error > (1e-6 if dtype == torch.float32 else 2**-7):
            wrong[width] = error
    assert wrong == {}


def test_quantised_to_nf4_the_error_is_that_of_four_bits_at_every_width():
    """Of normal weights about 0.09, and no width stands out; blocks of one entry are exact."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for width in range(64, 1101):
        weight = torch.randn(8, width, generator=generator)
        errors.append(distance(NF4Linear.from_weight(weight, None).dequantize(), weight.double()))
    assert min(errors) > 0.07
    assert max(errors) < 0.11


def test_the_definition_sees_a_scale_of_another_block():
    """The negative control: what the kernel does at width 48 is not within the tolerance above."""
    layer = nf4_layer(48)
    expected = defined(layer)
    layer.absmax = layer.absmax.roll(1)
    assert distance(layer.dequantize(), expected) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_is_wrong_in_wide_rows_is_not_used(dtype):
    """The self-check covers rows of one block and of several, of different scales."""

    def narrow_only(packed, absmax, out, blocksize):
        byte = packed[:, 0].long()
        values = NF4[torch.stack([byte >> 4, byte & 15], dim=1)].view(-1, 64)
        right = values * absmax[:, None]
        out.copy_((right if out.shape[1] == 64 else values * absmax.roll(1)[:, None]).view(out.shape))

    assert not nf4_kernel._reproduces(narrow_only, dtype)

    def right(packed, absmax, out, blocksize):
        byte = packed[:, 0].long()
        values = NF4[torch.stack([byte >> 4, byte & 15], dim=1)].view(-1, 64) * absmax[:, None]
        out.copy_(values.view(out.shape))

    assert nf4_kernel._reproduces(right, dtype)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.int8)


SMALL = (1, 2, 3, 5, 16, 17, 33)


def test_integer_products_are_exact_at_every_width():
    wide = [(5, width, 1 + width % 40) for width in WIDTHS]
    small = [(m, k, n) for m in SMALL for k in SMALL for n in SMALL]
    wrong = []
    for m, k, n in wide + small:
        left, stored = codes(m, k), codes(n, k)
        exact = left.double() @ stored.T.double()
        forward = int8_matmul._int_product(left, stored.T).double()
        if not torch.equal(forward, exact.float().double()):
            wrong.append(("x W^T", m, k, n))
        if not torch.equal(int8_matmul._int_product(left, stored.T.contiguous()).double(), exact.float().double()):
            wrong.append(("g W", m, k, n))
    assert wrong == []


def test_few_rows_are_right_at_every_width_that_they_take():
    wrong, taken = [], 0
    for width in WIDTHS:
        for rows in range(1, int8_matmul.FEW_ROWS + 1):
            generator = torch.Generator().manual_seed(width)
            x = torch.randn(rows, width, generator=generator).bfloat16()
            if not int8_matmul.takes_few_rows(x):
                continue
            taken += 1
            for outputs in (1, 3, 17, 64 + width % 50):
                weight, scales = codes(outputs, width), torch.rand(outputs, generator=generator)
                exact = x.double() @ (weight.double() * scales.double()[:, None] / 127).T
                if distance(int8_matmul.few_rows(x, weight, scales), exact) > 2**-6:
                    wrong.append((rows, width, outputs))
    assert wrong == []
    assert taken >= 4 * 17


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_int8_layer_is_right_at_every_width(mode, monkeypatch):
    monkeypatch.setattr(int8_matmul, "MODE", mode)
    wrong = []
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        rows, outputs = (1, 5, 4, 9)[width % 4], 1 + width % 23
        layer = Int8Linear.from_weight(torch.randn(outputs, width, generator=generator), None)
        weight = layer.weight.double() * layer.SCB.double()[:, None] / 127
        x, g = torch.randn(rows, width, generator=generator), torch.randn(rows, outputs, generator=generator)
        size = float(x.norm() * weight.norm() / width**0.5 + 1e-30)
        if (layer.product(x, None).double() - x.double() @ weight.T).norm() > 0.03 * size:
            wrong.append(("x W^T", rows, width, outputs))
        size = float(g.norm() * weight.norm() / outputs**0.5 + 1e-30)
        if (layer.transposed_product(g).double() - g.double() @ weight).norm() > 0.03 * size:
            wrong.append(("g W", rows, width, outputs))
    assert wrong == []


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    length = q.shape[-2]
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_its_formula_at_every_width_and_length(dtype):
    cases = [(width, 9) for width in range(1, 130)] + [(20, length) for length in (*range(1, 70), 127, 129, LONGEST)]
    wrong = []
    for width, length in cases:
        generator = torch.Generator().manual_seed(width * length)
        tensors = [torch.randn(2, 3, length, width, generator=generator).to(dtype) for _ in range(4)]
        ours = [x.clone().requires_grad_() for x in tensors[:3]]
        exact = [x.double().requires_grad_() for x in tensors[:3]]
        output, expected = ShortAttention.apply(*ours, None), eager_attention(*exact)
        output.backward(tensors[3])
        expected.backward(tensors[3].double())
        errors = [distance(output, expected)]
        errors += [distance(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
        if not max(errors) <= (1e-5 if dtype == torch.float32 else 0.02):
            wrong.append((width, length, errors))
    assert wrong == []


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width"), [(1, 1, 1, 8), (3, 4, 4, 64), (5, 9, 3, 64), (2, 8, 1, 40)]
)
def test_attention_of_the_last_token_is_its_definition_at_every_length(batch, heads, groups, width, monkeypatch):
    monkeypatch.setattr(attention, "DECODE_BYTES", 2**14)  # several pieces
    generator = torch.Generator().manual_seed(width)
    for length in (1, 2, 7, 64, 200):
        q = torch.randn(batch, heads, 1, width, generator=generator).bfloat16()
        k, v = (torch.randn(batch, groups, 300, width, generator=generator).bfloat16()[:, :, :length] for _ in range(2))
        wide = [x.double().repeat_interleave(heads // groups, dim=1) for x in (k, v)]
        for scaling in (None, 0.3):
            scores = q.double() @ wide[0].transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
            actual = last_token_attention(q, k, v, scaling)
            assert distance(actual, scores.softmax(-1) @ wide[1]) < 2**-8
            assert actual.dtype == q.dtype
            assert actual.shape == q.shape
