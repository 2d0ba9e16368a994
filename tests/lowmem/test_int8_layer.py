"""The int8 layer: its format, which kernel multiplies, exactness where nothing is rounded, messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.lowmem.layers import scratch_bytes
from xfactor_peft.lowmem import int8_matmul
from xfactor_peft.lowmem.int8 import Int8Linear, quantize_rows
from xfactor_peft.lowmem.scratch import release_scratch


@pytest.fixture
def modes(monkeypatch):
    """Sets `int8_matmul.MODE`, which is "auto" at first."""
    monkeypatch.setattr(int8_matmul, "MODE", "auto")
    return partial(monkeypatch.setattr, int8_matmul, "MODE")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(outputs=12, inputs=20, *, bias=False, **options):
    return Int8Linear.from_weight(draw(outputs, inputs), draw(outputs, seed=1) if bias else None, **options)


def exact(layer):
    """W = CB SCB / 127 in float64."""
    return layer.weight.double() * layer.SCB.double()[:, None] / 127


def test_rows_quantised_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.4], [0.0, 0.0, 0.0], [6.0, -2.0, 3.0]], requires_grad=True)
    for w in (weight, weight.double(), weight.T.contiguous().T):
        codes, scales = quantize_rows(w)
        assert codes.dtype == torch.int8
        assert scales.dtype == torch.float32
        assert codes.tolist() == [[32, -127, 13], [0, 0, 0], [127, -42, 64]]
        assert scales.tolist() == [4.0, 0.0, 6.0]
        assert codes.is_contiguous()
        assert not codes.requires_grad
        assert not scales.requires_grad
    assert torch.equal(quantize_rows(weight.bfloat16())[0], quantize_rows(weight.bfloat16().float())[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dequantised_in_the_dtype_asked_for(dtype):
    made = layer()
    assert made.dequantize().dtype == torch.float32
    weight = made.dequantize(dtype)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, exact(made).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_scales_are_float32_whatever_the_default_dtype():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = Int8Linear(20, 12, True)
        assert made.SCB.dtype == torch.float32
        assert layer().SCB.dtype == torch.float32
    finally:
        torch.set_default_dtype(previous)


def test_an_empty_layer_has_the_shapes_of_its_format():
    made = Int8Linear(20, 12, True)
    assert (made.weight.shape, made.weight.dtype, made.weight.requires_grad) == ((12, 20), torch.int8, False)
    assert (made.SCB.shape, made.bias.shape, made.from_conv1d) == ((12,), (12,), False)
    assert set(made.state_dict()) == {"weight", "SCB", "bias"}
    assert set(Int8Linear(20, 12, False).state_dict()) == {"weight", "SCB"}
    assert Int8Linear(20, 12, False).bias is None
    assert Int8Linear(20, 12, False, from_conv1d=True).from_conv1d


def test_the_bias_is_copied_and_frozen():
    bias = torch.ones(12, requires_grad=True)
    made = Int8Linear.from_weight(draw(12, 20), bias)
    assert not made.from_conv1d
    assert Int8Linear.from_weight(draw(12, 20), bias, from_conv1d=True).from_conv1d
    assert made.bias.tolist() == [1.0] * 12
    assert made.bias.data_ptr() != bias.data_ptr()
    assert isinstance(made.bias, torch.nn.Parameter)
    assert not any(p.requires_grad for p in made.parameters())
    assert repr(made) == "Int8Linear(in_features=20, out_features=12, bias=True)"
    assert repr(layer()) == "Int8Linear(in_features=20, out_features=12, bias=False)"


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "mode", "kernel"),
    [
        (torch.float32, 4, 64, "on", None),  # few rows of float32 are not worth rounding
        (torch.float32, 5, 64, "on", "product"),
        (torch.bfloat16, 4, 64, "on", "few_rows"),
        (torch.bfloat16, 4, 80, "on", None),  # torch's kernel for few rows reads beyond the end of such a row
        (torch.bfloat16, 1, 20, "on", None),
        (torch.bfloat16, 5, 20, "on", "product"),
        (torch.float64, 4, 64, "on", None),
        (torch.float64, 5, 64, "on", None),
        (torch.bfloat16, 4, 64, "off", None),
        (torch.bfloat16, 5, 64, "off", None),
    ],
)
def test_which_kernel_multiplies(dtype, rows, inputs, mode, kernel, modes, monkeypatch):
    modes(mode)
    called = []
    for name in ("few_rows", "product"):
        original = getattr(int8_matmul, name)
        monkeypatch.setattr(int8_matmul, name, lambda *a, n=name, f=original: called.append(n) or f(*a))
    made, x = layer(inputs=inputs), draw(rows, inputs, seed=2).to(dtype)
    y = made.product(x, None)
    assert y.dtype == dtype
    assert called == ([kernel] if kernel else [])
    tolerance = 0.02 if kernel == "product" else 4 * torch.finfo(dtype).eps
    expected = x.double() @ exact(made).T
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    addend = torch.ones(rows, 12, dtype=dtype)
    assert made.product(x, addend) is addend
    assert (addend.double() - 1 - expected).norm() <= tolerance * (expected.norm() + rows * 12)


@pytest.mark.parametrize(("mode", "called"), [("on", 1), ("forward", 0), ("off", 0)])
def test_which_kernel_takes_the_gradient(mode, called, modes, monkeypatch):
    modes(mode)
    calls, original = [], int8_matmul.transposed_product
    monkeypatch.setattr(int8_matmul, "transposed_product", lambda *a: calls.append(1) or original(*a))
    made, gradient = layer(), draw(9, 12, seed=3)
    result = made.transposed_product(gradient)
    expected = gradient.double() @ exact(made)
    assert len(calls) == called
    assert (result.double() - expected).norm() <= (0.02 if called else 1e-6) * expected.norm()


def test_without_int8_products_both_directions_share_one_dequantised_copy(modes):
    modes("off")
    made = layer()
    release_scratch()
    made(draw(9, 20, seed=2).requires_grad_()).sum().backward()
    assert scratch_bytes() == 4 * 12 * 20
    release_scratch()


def test_shapes_and_dtypes_on_the_meta_device():
    """A dry run: nothing is on the CPU, and the scales keep their dtype on the way."""
    made = layer(bias=True).to("meta", torch.bfloat16)
    assert {t.device.type for t in made.state_dict().values()} == {"meta"}
    assert (made.SCB.dtype, made.bias.dtype, made.weight.dtype) == (torch.float32, torch.bfloat16, torch.int8)
    x = torch.zeros(2, 9, 20, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = made(x)
    assert (y.shape, y.dtype) == ((2, 9, 12), torch.bfloat16)
    y.sum().backward()
    assert x.grad.shape == x.shape
    release_scratch()


def test_codes_are_put_in_place_without_a_copy():
    made, other = layer(), layer(bias=True)
    weight, scales = other.codes()
    made.set_codes(weight, scales)
    assert made.weight.data_ptr() == weight.data_ptr()
    assert made.SCB is scales
    assert not made.weight.requires_grad
    for weight_, scales_, message in (
        (weight.float(), scales, "weight has shape (12, 20) and dtype torch.float32; "),
        (weight[:3], scales, "weight has shape (3, 20) and dtype torch.int8; "),
        (weight, scales.double(), "SCB has shape (12,) and dtype torch.float64; "),
        (weight, scales[:3], "SCB has shape (3,) and dtype torch.float32; "),
    ):
        with pytest.raises(ValueError, match="has shape") as caught:
            made.set_codes(weight_, scales_)
        needed = "(12, 20) and torch.int8" if "weight" in message else "(12,) and torch.float32"
        assert str(caught.value) == f"{message}this Int8Linear needs {needed}"
