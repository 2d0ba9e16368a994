"""The int8 matrix products by themselves: by hand, against their formula in float64, in pieces, and in memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.lowmem.layers import scratch_bytes
from xfactor_peft.lowmem import int8_matmul
from xfactor_peft.lowmem.int8 import quantize_rows
from xfactor_peft.lowmem.scratch import release_scratch

WIDE, TALL = (96, 32), (32, 96)


@pytest.fixture(params=[torch.float32, torch.float64])
def default_dtype(request):
    """Loading a model sets PyTorch's default dtype to the model's; nothing here may depend on it."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture
def modes(monkeypatch):
    """Sets `int8_matmul.MODE`, which is "auto" at first."""
    monkeypatch.setattr(int8_matmul, "MODE", "auto")
    return partial(monkeypatch.setattr, int8_matmul, "MODE")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def rounded(x, taken):
    """(q a / 127, outliers) of rows of x, the outlier columns known; float64."""
    kept = x.clone()
    kept[:, taken] = 0
    peak = kept.abs().amax(1, keepdim=True)
    q = torch.where(peak > 0, kept * (127 / peak), 0).round()
    return q * peak / 127, x - kept


def forward_formula(x, codes, scales, taken=()):
    weight = codes.double() * scales.double()[:, None] / 127
    q, outliers = rounded(x.double(), list(taken))
    return q @ weight.T + outliers @ weight.T


def backward_formula(gradient, codes, scales, taken=()):
    p, outliers = rounded(gradient.double() * scales.double() / 127, list(taken))
    return (p + outliers) @ codes.double()


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-9}[dtype]  # float32 throughout, rounded once at the end
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_the_weight_as_the_left_factor_gives_the_same_integers(rows, monkeypatch):
    codes, scales = quantize_rows(draw(48, 1024))
    x, calls, product = draw(rows, 1024, seed=1), [], torch._int_mm

    def counted(left, right, out):
        calls.append(left.shape)
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "_int_mm", counted)
    plain = int8_matmul.product(x, codes, scales, None)
    monkeypatch.setattr(int8_matmul, "WEIGHT_FIRST", 1024)
    assert torch.equal(int8_matmul.product(x, codes, scales, None), plain)
    assert calls == [(rows, 1024), (48, 1024)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [(), (5, 17)])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_products_are_those_of_the_formula(shape, taken, dtype, default_dtype, monkeypatch):
    codes, scales = quantize_rows(draw(*shape) * torch.logspace(-1, 1, shape[0], dtype=torch.float32)[:, None])
    x, gradient = draw(130, shape[1], seed=1), draw(130, shape[0], seed=2) / scales
    for t in (x, gradient):
        t[3] = 0
        t[:, list(taken)] *= 1e3
    monkeypatch.setattr(int8_matmul, "CREST", 4.0 if taken else 1e9)  # an entry of 96 is below 10 times the rms
    x, gradient = x.to(dtype), gradient.to(dtype)
    close(int8_matmul.product(x, codes, scales, None), forward_formula(x, codes, scales, taken), dtype)
    addend = draw(130, shape[0], seed=3, dtype=dtype)
    expected = addend.double() + forward_formula(x, codes, scales, taken)
    assert int8_matmul.product(x, codes, scales, addend) is addend
    close(addend, expected, dtype)
    result = int8_matmul.transposed_product(gradient, codes, scales)
    close(result, backward_formula(gradient, codes, scales, taken), dtype)


def test_products_over_an_inner_dimension_of_one():
    codes, scales = quantize_rows(draw(70, 1))
    x = draw(9, 1)
    close(int8_matmul.product(x, codes, scales, None), forward_formula(x, codes, scales), torch.float32)
    codes, scales = quantize_rows(draw(1, 70))
    close(int8_matmul.transposed_product(x, codes, scales), backward_formula(x, codes, scales), torch.float32)


def test_quantised_by_hand():
    x = torch.tensor([[1.0, -4.0, 0.4], [0.0, 0.0, 0.0], [6.0, -2.0, 3.0]])
    codes, scales, outliers = int8_matmul._quantize(x, None)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[32, -127, 13], [0, 0, 0], [127, -42, 64]]
    assert scales.tolist() == [[pytest.approx(4 / 127)], [0.0], [pytest.approx(6 / 127)]]
    assert outliers is None
    codes, scales, _ = int8_matmul._quantize(x, torch.tensor([4.0, 1.0, 0.0]))
    assert codes.tolist() == [[127, -127, 0], [0, 0, 0], [127, -11, 0]]
    assert scales.tolist() == [[pytest.approx(4 / 127)], [0.0], [pytest.approx(24 / 127)]]


def test_a_column_is_an_outlier_beyond_crest_times_the_rms_of_its_row(monkeypatch):
    """One entry a and 15 of size 1: rms^2 = (a^2 + 15) / 16; a = 3 exceeds 2 rms, a = 2 does not."""
    monkeypatch.setattr(int8_matmul, "CREST", 2.0)
    x = torch.ones(2, 16)
    x[0, 6] = -2
    assert int8_matmul._quantize(x, None)[2] is None
    x[0, 6] = -3
    codes, scales, (index, values) = int8_matmul._quantize(x, None)
    assert index.tolist() == [6]
    assert values.tolist() == [[-3.0], [1.0]]
    assert codes[:, 6].tolist() == [0, 0]
    assert (codes.sum(1) == 15 * 127).all()
    assert scales.flatten().tolist() == [pytest.approx(1 / 127)] * 2


def test_outliers_by_hand():
    """Each entry counts against the limit of its own row; the limit itself is not beyond; at most a 16th is taken."""
    x = torch.zeros(4, 32)
    limit = torch.tensor([[100.0], [1.0], [1.0], [0.0]])
    x[0, 7], x[1, 9], x[1, 5], x[2, 2] = 90.0, 1.0, -1.5, 0.5
    wide = x.clone()
    index, values = int8_matmul._take_outliers(wide, limit)
    assert index.tolist() == [5]
    assert torch.equal(values, x[:, [5]])
    assert not wide[:, 5].any()
    wide[:, 5] = x[:, 5]
    assert torch.equal(wide, x)

    wide[0, [20, 21]] = torch.tensor([300.0, 200.0])
    index, values = int8_matmul._take_outliers(wide, limit)
    assert index.tolist() == [20, 21]  # of three, the two that go furthest beyond
    assert values.tolist() == [[300.0, 200.0], [0, 0], [0, 0], [0, 0]]
    assert wide[1, 5] == -1.5
    narrow = torch.tensor([[5.0, -7.0, 1.0]])
    assert int8_matmul._take_outliers(narrow, torch.ones(1, 1))[0].tolist() == [1]  # one column at least


def test_pieces_are_multiples_of_64_rows_within_the_budget(monkeypatch):
    rows = int8_matmul._pieces(5000, 1000)  # 16 MiB / (4 bytes * 1000) = 4194.3
    assert rows == [slice(0, 4160), slice(4160, 8320)]
    assert int8_matmul._pieces(128, 10**9) == [slice(0, 64), slice(64, 128)]
    monkeypatch.setattr(int8_matmul, "PRODUCT_BYTES", 4 * 10 * 200)
    assert int8_matmul._pieces(193, 10) == [slice(0, 192), slice(192, 384)]
    assert int8_matmul._pieces(1, 10) == [slice(0, 192)]


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_buffers_hold_one_piece(shape, default_dtype, monkeypatch):
    """int32 products, one float32 buffer for x and the result, int8 codes of x; perhaps the addend in float32."""
    (outputs, inputs), rows = shape, 64
    monkeypatch.setattr(int8_matmul, "PRODUCT_BYTES", 4 * rows * outputs)
    codes, scales = quantize_rows(draw(*shape))
    for addend in (None, torch.zeros(200, outputs, dtype=torch.float32)):
        release_scratch()
        int8_matmul.product(draw(200, inputs), codes, scales, addend)
        expected = rows * (4 * outputs + 4 * max(shape) + inputs)
        assert scratch_bytes() == expected + (0 if addend is None else 4 * rows * outputs)
    release_scratch()
    monkeypatch.setattr(int8_matmul, "PRODUCT_BYTES", 4 * rows * max(shape))
    int8_matmul.transposed_product(draw(200, outputs), codes, scales)
    assert scratch_bytes() == rows * (4 * inputs + 4 * max(shape) + outputs)
    release_scratch()


def test_few_rows_are_exact_for_a_row_of_the_identity(default_dtype):
    """W e_i is a column of W: codes up to 127 fit bf16, and the scales are applied in float32."""
    codes, scales = quantize_rows(draw(48, 64))
    x = torch.eye(64, dtype=torch.bfloat16)[:, :3].T  # not contiguous
    y = int8_matmul.few_rows(x, codes, scales)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (codes[:, :3].float() * (scales / 127)[:, None]).T.bfloat16())


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [("on", True, True), ("forward", True, False), ("off", False, False), ("auto", None, None)],
)
@pytest.mark.parametrize("supported", [True, False])
def test_modes(mode, forward, backward, supported, modes, monkeypatch):
    monkeypatch.setattr(int8_matmul, "supported", lambda: supported)
    modes(mode)
    x = torch.zeros(1)
    assert int8_matmul.enabled(x) is (supported if forward is None else forward)
    assert int8_matmul.enabled(x, backward=True) is (supported if backward is None else backward)
    assert not int8_matmul.enabled(x.double())
    assert not int8_matmul.enabled(x.to("meta"))
