"""The frozen layers: their products, gradients and formats, against the same layer with dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.lowmem.layers import SHAPES, error, make, saved_bytes, scratch_bytes
from xfactor_peft.lowmem import int8_matmul
from xfactor_peft.lowmem.fused_lora import frozen_linear
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear
from xfactor_peft.lowmem.peft_layers import PlainWeight
from xfactor_peft.lowmem.scratch import release_scratch, scratch

KINDS = ["linear", "conv1d", "int8", "nf4"]
SCALING = 2.0


@pytest.fixture(params=["auto", "off"])
def mode(request, monkeypatch):
    """The int8 matrix product as detected, and switched off."""
    monkeypatch.setattr(int8_matmul, "MODE", request.param)
    return request.param


def inputs(out_features: int, in_features: int, dtype: torch.dtype, rank: int = 3) -> dict[str, torch.Tensor]:
    """x, bias, A and B that require gradients; adapters in float32 or better, as PEFT keeps them."""
    generator = torch.Generator().manual_seed(1)
    master = torch.promote_types(dtype, torch.float32)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return {
        "x": draw(2, 9, in_features),
        "bias": draw(out_features),
        "lora_a": draw(rank, in_features, dtype=master, scale=in_features**-0.5),
        "lora_b": draw(out_features, rank, dtype=master),
    }


def eager(x, weight, bias, lora_a, lora_b):
    """What PEFT computes: the adapters in their own dtype, the sum in x's."""
    y = F.linear(x, weight.to(x.dtype), bias)
    return y + (F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * SCALING).to(y.dtype)


def run(function, values: dict[str, torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient, in float64."""
    values = {name: v.detach().clone().requires_grad_() for name, v in values.items()}
    y = function(**values)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach().double(), **{name: v.grad.double() for name, v in values.items()}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_that_of_eager(kind, shape, dtype, mode):
    weight, exact = make(kind, *shape, dtype)
    values = inputs(*shape, dtype)
    upstream = torch.randn(2, 9, shape[0], generator=torch.Generator().manual_seed(2))

    truth = run(lambda **v: eager(weight=exact, **v), {n: v.double() for n, v in values.items()}, upstream.double())
    ours = run(lambda **v: frozen_linear(weight=weight, scaling=SCALING, **v), values, upstream.to(dtype))
    theirs = run(lambda **v: eager(weight=exact, **v), values, upstream.to(dtype))

    rounding = 2 * torch.finfo(dtype).eps
    quantized = kind == "int8" and mode == "auto" and int8_matmul.supported()
    for name in truth:
        allowed = 0.012 if quantized and name in ("y", "x") else rounding
        assert error(ours[name], truth[name]) <= error(theirs[name], truth[name]) + allowed, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    weight, exact = make(kind, 7, 13, torch.float64)
    values = inputs(7, 13, torch.float64)

    def function(x, bias, lora_a, lora_b):
        return frozen_linear(x, weight, bias, lora_a, lora_b, SCALING)

    assert torch.autograd.gradcheck(function, tuple(values.values()))
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight), (values["x"],))
    torch.testing.assert_close(function(**values), eager(weight=exact, **values))


def test_gradcheck_would_notice_a_wrong_gradient():
    """Negative control: the backward of a different weight."""

    class Wrong(PlainWeight):
        def transposed_product(self, gradient):
            return super().transposed_product(gradient) * 1.01

    weight = Wrong(torch.randn(7, 13, dtype=torch.float64))
    x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: frozen_linear(x, weight), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_only_x_and_its_projection_are_saved(kind):
    weight, exact = make(kind, 64, 128, torch.bfloat16)
    values = inputs(64, 128, torch.bfloat16)
    adapters = sum(values[n].nbytes for n in ("lora_a", "lora_b"))
    x_and_h = values["x"].nbytes + 18 * 3 * 2

    assert saved_bytes(lambda: frozen_linear(weight=weight, scaling=SCALING, **values)) == x_and_h + adapters
    # Negative control: the same sum composed of PyTorch's own operations keeps more than twice x.
    assert saved_bytes(lambda: eager(weight=exact.bfloat16(), **values)) > 2 * values["x"].nbytes + adapters


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_without_lora(kind):
    weight, _ = make(kind, 64, 128, torch.bfloat16)
    x = inputs(64, 128, torch.bfloat16)["x"]
    assert saved_bytes(lambda: frozen_linear(x, weight)) == 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_products_leave_the_weight_alone(kind):
    layer, exact = make(kind, 64, 128, torch.float32)
    for rows in (1, 9, 70):
        layer(torch.randn(rows, 128, requires_grad=True)).sum().backward()
    torch.testing.assert_close(layer.dequantize(torch.float64), exact, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, int8_matmul.FEW_ROWS, int8_matmul.FEW_ROWS + 1, 65])
def test_any_number_of_rows(rows, mode):
    layer, exact = make("int8", 64, 128, torch.float32)
    x = torch.randn(rows, 128)
    assert error(layer(x).double(), x.double() @ exact.T) < 0.01


def test_rows_in_pieces_give_the_same(monkeypatch):
    layer, _ = make("int8", 64, 128, torch.float32)
    x = torch.randn(200, 128, requires_grad=True)
    whole = run(layer.forward, {"x": x}, torch.ones(200, 64))
    monkeypatch.setattr(int8_matmul, "PRODUCT_BYTES", 1)  # the least is 64 rows
    pieces = run(layer.forward, {"x": x}, torch.ones(200, 64))
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=0, atol=0)


@pytest.mark.skipif(not int8_matmul.supported(), reason="needs a CPU with VNNI or AMX")
def test_outlier_columns_do_not_spoil_the_others(monkeypatch):
    layer, exact = make("int8", 64, 512, torch.float32)
    x = torch.randn(50, 512)
    x[:, [3, 100]] *= 200
    rest = torch.ones(512, dtype=torch.bool)
    rest[[3, 100]] = False
    outliers = x[:, ~rest].double() @ exact[:, ~rest].T
    expected = x[:, rest].double() @ exact[:, rest].T

    assert error(layer(x).double() - outliers, expected) < 0.02
    monkeypatch.setattr(int8_matmul, "CREST", float("inf"))  # negative control
    assert error(layer(x).double() - outliers, expected) > 0.2


@pytest.mark.skipif(not int8_matmul.supported(), reason="needs a CPU with VNNI or AMX")
def test_int8_input_gradient_points_the_right_way():
    layer, exact = make("int8", 512, 256, torch.float32)
    gradient = torch.randn(64, 512) * torch.logspace(-3, 0, 512)  # columns of very different size
    x = torch.randn(64, 256, requires_grad=True)
    layer(x).backward(gradient)
    expected = gradient.double() @ exact
    cosine = F.cosine_similarity(x.grad.double().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.9995


def test_rows_of_zeros():
    weight = torch.randn(6, 8)
    weight[2] = 0
    for kind in (Int8Linear, NF4Linear):
        layer = kind.from_weight(weight, None)
        x = torch.zeros(9, 8, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert not y.any()
        assert torch.isfinite(x.grad).all()
        assert not layer.dequantize()[2].any()


def test_scales_stay_float32_when_the_module_is_converted():
    for kind, name in ((Int8Linear, "SCB"), (NF4Linear, "absmax")):
        layer = kind.from_weight(torch.randn(64, 64), torch.randn(64))
        before = getattr(layer, name).clone()
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16
        torch.testing.assert_close(getattr(layer, name), before, rtol=0, atol=0)


def test_autocast_computes_in_its_dtype():
    layer, _ = make("int8", 64, 128, torch.float32)
    values = inputs(64, 128, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(values["x"], layer, None, values["lora_a"], values["lora_b"], SCALING)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert values["x"].grad.dtype == torch.float32
    assert values["lora_b"].grad.abs().sum() > 0


def test_conv1d_orientation():
    conv = Conv1D(7, 13)
    x = torch.randn(5, 13)
    torch.testing.assert_close(frozen_linear(x, PlainWeight(conv.weight, transposed=True), conv.bias), conv(x))


def test_scratch_is_one_buffer_of_the_largest_size():
    release_scratch()
    small = scratch("test", (3, 5), torch.float32)
    large = scratch("test", (10, 10), torch.float32)
    again = scratch("test", (4,), torch.float32)
    assert large.data_ptr() == again.data_ptr()
    assert small.shape == (3, 5)
    assert scratch_bytes() == 400
    release_scratch()
    assert scratch_bytes() == 0


@pytest.mark.parametrize("kind", [Int8Linear, NF4Linear])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_transposed_weight_gives_the_same_layer(kind, rows, mode):
    """Conv1D hands in a view with transposed strides; decoding kernels want codes in row order."""
    stored = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(4))
    layer, plain = kind.from_weight(stored.T, None), kind.from_weight(stored.T.contiguous(), None)
    assert layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x), plain(x))
