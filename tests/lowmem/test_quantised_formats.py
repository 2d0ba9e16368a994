"""NF4 with and without its compiled kernel; both formats against bitsandbytes' own, to and fro."""

import pytest
import torch

from tests.lowmem.layers import SHAPES, error, make
from xfactor_peft.lowmem import nf4_kernel
from xfactor_peft.lowmem.int8 import Int8Linear, quantize_rows
from xfactor_peft.lowmem.nf4 import CODE, NF4Linear, _grid, quantize_nf4


def test_nf4_does_not_depend_on_the_default_dtype():
    weight, previous = torch.randn(16, 64), torch.get_default_dtype()
    expected = NF4Linear.from_weight(weight, None)
    torch.set_default_dtype(torch.bfloat16)
    _grid.cache_clear()
    try:
        made = NF4Linear.from_weight(weight, None)
        assert NF4Linear(64, 16, False).absmax.dtype == torch.float32
    finally:
        torch.set_default_dtype(previous)
        _grid.cache_clear()
    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(made.absmax, expected.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_without_the_compiled_kernel(shape, monkeypatch):
    layer, exact = make("nf4", *shape, torch.float32)
    monkeypatch.setattr(nf4_kernel, "compiled_kernel", lambda *_: None)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        eps = torch.finfo(torch.promote_types(dtype, torch.float32) if dtype == torch.float64 else dtype).eps
        assert error(layer.dequantize(dtype).double(), exact) <= 2 * eps


def test_compiled_nf4_kernel_agrees_with_torch():
    if nf4_kernel.compiled_kernel(torch.bfloat16, torch.device("cpu")) is None:
        pytest.skip("this version of bitsandbytes has no kernel that was tried")
    layer, exact = make("nf4", 64, 128, torch.float32)
    assert error(layer.dequantize(torch.float32).double(), exact) < 1e-6
    assert error(layer.dequantize(torch.bfloat16).double(), exact) < 2**-8


def test_quantisers_against_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(507, 64)
    codes, scales = quantize_rows(weight)
    theirs, their_scales, _ = bnb.functional.int8_vectorwise_quant(weight.clone())
    assert (codes.int() - theirs.int()).abs().max() <= 1
    assert (codes != theirs).float().mean() < 1e-3
    torch.testing.assert_close(scales, their_scales)

    packed, absmax = quantize_nf4(weight)
    their_packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(packed, their_packed)
    torch.testing.assert_close(absmax, state.absmax)


def test_nf4_picks_the_nearest_code_also_beside_the_bounds():
    from xfactor_peft.lowmem.nf4 import _nearest

    code = torch.tensor(CODE)
    bounds = (code[:-1] + code[1:]) / 2
    two = torch.tensor(2.0)
    beside = [bounds, bounds.nextafter(two), bounds.nextafter(-two)]
    values = torch.cat([torch.rand(100_000) * 2 - 1, *beside, torch.arange(-512, 513) / 512])
    assert torch.equal(_nearest(values).long(), torch.bucketize(values, bounds))


def test_int8_state_of_bitsandbytes_converts_both_ways():
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    theirs.load_state_dict({"weight": torch.randn(48, 64), "bias": torch.randn(48)})
    theirs.to("cpu")
    x = torch.randn(10, 64)
    expected = theirs(x)

    their_state = theirs.state_dict()
    ours = Int8Linear(64, 48, False)
    ours.set_codes(their_state["weight"], their_state["SCB"])
    ours.bias = torch.nn.Parameter(their_state["bias"])
    assert error(ours(x).double(), expected.double()) < 0.01

    back = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    back.weight = bnb.nn.Int8Params(ours.weight.data, requires_grad=False, CB=ours.weight.data, SCB=ours.SCB)
    state = {**ours.state_dict(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert set(state) == set(their_state)
    back.load_state_dict(state)
    torch.testing.assert_close(back(x), expected)


def test_nf4_state_of_bitsandbytes_converts():
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
    theirs.load_state_dict({"weight": torch.randn(48, 64), "bias": torch.randn(48)})
    theirs.to("cpu")
    state = theirs.state_dict()
    ours = NF4Linear(64, 48, False)
    ours.set_codes(state["weight"].view(torch.uint8).reshape(-1, 1), state["weight.absmax"])
    ours.bias = torch.nn.Parameter(state["bias"])
    x = torch.randn(10, 64)
    assert error(ours(x).double(), theirs(x).double()) < 1e-5


def test_codes_that_do_not_fit():
    layer = Int8Linear.from_weight(torch.randn(4, 4), None)
    with pytest.raises(ValueError, match=r"SCB has shape \(3,\)"):
        layer.set_codes(layer.weight.data, torch.ones(3))
