"""The chunked KL against its eager twin, against hand-worked cases, and in memory."""

import math

import pytest
import torch

from xfactor_peft.errors import XFactorError
from xfactor_peft.objective import reference
from xfactor_peft.objective.kl import chunk_positions, kl_loss, loss_positions
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.tokens.token_set import TokenSet


def problem(positions, width, vocab, *, dtype=torch.float32, beta=0.0, size=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = size or max(1, vocab // 7)
    tokens = TokenSet(tuple(range(1, 1 + size)), vocab)
    hidden = torch.randn(positions, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype)
    target = UniformTarget(tokens, 1.0, beta).probabilities()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    return leaves, target, tokens.mask()


def run(function, leaves, target, mask, **options):
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss, mass = function(copies[0], copies[1], target, mask, bias=copies[2], **options)
    (3.0 * loss).backward()  # a factor, so that the incoming gradient is seen to count
    return loss.detach(), mass, [c.grad for c in copies]


@pytest.mark.parametrize(("positions", "width", "vocab"), [(1, 3, 7), (13, 7, 507), (64, 32, 1000), (65, 16, 129)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [None, 1, 5, 64])
def test_equals_kl_div_on_full_logits(positions, width, vocab, beta, chunk):
    leaves, target, mask = problem(positions, width, vocab, beta=beta)
    expected = run(reference.kl_loss, leaves, target, mask)
    actual = run(kl_loss, leaves, target, mask, chunk=chunk)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(actual[2], expected[2], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_direction_by_hand():
    """P = (1/2, 1/2, 0), q = (1/4, 1/4, 1/2): KL(P||q) = ln 2; the other direction would be infinite."""
    hidden = torch.tensor([[1.0]])
    weight = torch.log(torch.tensor([[0.25], [0.25], [0.5]]))
    target = torch.tensor([0.5, 0.5, 0.0])
    result = kl_loss(hidden, weight, target, torch.tensor([True, True, False]))
    assert result.loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert result.set_mass.item() == pytest.approx(0.5, rel=1e-6)


def test_uniform_model_scores_log_v_over_s():
    tokens = TokenSet((3, 4, 5), 300)
    result = kl_loss(torch.zeros(4, 8), torch.randn(300, 8), UniformTarget(tokens).probabilities(), tokens.mask())
    assert result.loss.item() == pytest.approx(math.log(300 / 3), rel=1e-5)


def test_gradcheck_in_float64():
    leaves, target, mask = problem(3, 4, 7, dtype=torch.float64, beta=0.2)
    assert torch.autograd.gradcheck(
        lambda h, w, b: kl_loss(h, w, target.double(), mask, bias=b, chunk=2).loss,
        leaves,
        eps=1e-6,
        atol=1e-6,
    )


def test_bf16_is_no_worse_than_eager_bf16():
    exact = run(reference.kl_loss, *problem(64, 32, 1000, dtype=torch.float64))
    low = problem(64, 32, 1000, dtype=torch.bfloat16)
    ours, eager = run(kl_loss, *low), run(reference.kl_loss, *low)
    assert abs(ours[0] - exact[0]) <= abs(eager[0] - exact[0]) + 1e-3 * exact[0]
    for o, e, x in zip(ours[2], eager[2], exact[2], strict=True):
        assert (o.double() - x).norm() <= (e.double() - x).norm() * 1.1 + 1e-3 * x.norm()


def test_frozen_weight_gets_no_gradient_buffer():
    leaves, target, mask = problem(8, 4, 50)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        kl_loss(leaves[0], leaves[1].detach(), target, mask)
        assert saved == [(8, 4)]
        saved.clear()
        kl_loss(leaves[0], leaves[1], target, mask)
        assert saved == [(8, 4), (50, 4)]
        saved.clear()
        kl_loss(leaves[0].detach(), leaves[1], target, mask, bias=leaves[2].detach())
        assert saved == [(50, 4)]


def test_no_tensor_of_positions_by_vocabulary():
    """The largest tensor made is one chunk; the eager twin, under the same watch, makes the whole."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    leaves, target, mask = problem(256, 8, 2000)
    with Largest() as chunked:
        kl_loss(leaves[0], leaves[1], target, mask, chunk=16).loss.backward()
    with Largest() as eager:
        reference.kl_loss(leaves[0], leaves[1], target, mask)[0].backward()
    assert chunked.elements <= 16 * 2000
    assert eager.elements >= 256 * 2000


def test_chunk_follows_the_byte_budget():
    assert chunk_positions(50257) * 50257 * 4 <= 16 * 2**20
    assert loss_positions(50257, torch.bfloat16) == 333
    assert loss_positions(50257, torch.float32) == 166
    assert loss_positions(10**9, torch.float32) == 1
    assert chunk_positions(10**9) == 1
    assert chunk_positions(1000, 11_999) == 2
    assert chunk_positions(1000, 12_000) == 3


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0, 0), (1, 2), (1, -0.1), (float("nan"), 0), (float("inf"), 0)])
def test_alpha_must_exceed_beta(alpha, beta):
    with pytest.raises(XFactorError, match="`alpha` must be greater than `beta`"):
        UniformTarget(TokenSet((1,), 5), alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (1, 0.5), (10, 1)])
def test_target_is_a_two_level_distribution(alpha, beta):
    target = UniformTarget(TokenSet((1, 3), 11), alpha, beta)
    p = target.probabilities()
    assert p.sum().item() == pytest.approx(1)
    assert (p[1] * beta).item() == pytest.approx((p[0] * alpha).item())
    assert p[[1, 3]].sum().item() == pytest.approx(target.set_mass)


def test_wrong_shapes_are_named():
    leaves, target, mask = problem(4, 3, 9)
    with pytest.raises(ValueError, match=r"target has shape \(8,\), expected \(9,\)"):
        kl_loss(leaves[0], leaves[1], target[:8], mask)
    with pytest.raises(ValueError, match="hidden has width 2"):
        kl_loss(leaves[0][:, :2], leaves[1], target, mask)
    with pytest.raises(ValueError, match="at least one position"):
        kl_loss(leaves[0][:0], leaves[1], target, mask)
    for name, vector in (("mask", mask), ("bias", leaves[2])):
        values = {"target": target, "mask": mask, "bias": leaves[2], name: vector[:8]}
        with pytest.raises(ValueError, match=rf"^{name} has shape \(8,\), expected \(9,\)$"):
            kl_loss(leaves[0], leaves[1], **values)
    with pytest.raises(ValueError, match=r"^kl_loss needs at least one position$"):
        kl_loss(leaves[0][:0], leaves[1], target, mask)
    with pytest.raises(ValueError, match=r"^hidden has width 2, the output embedding 3$"):
        kl_loss(leaves[0][:, :2], leaves[1], target, mask)


def test_any_leading_dimensions():
    """(B, T, D) is (B T, D): the same loss, gradients in the shape of the states."""
    leaves, target, mask = problem(6, 4, 50)
    flat = run(kl_loss, leaves, target, mask)
    leaves[0] = leaves[0].detach().view(2, 3, 4)
    loss, mass, grads = run(kl_loss, leaves, target, mask)
    assert (loss, mass) == flat[:2]
    assert torch.equal(grads[0], flat[2][0].view(2, 3, 4))


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default_dtype):
    leaves, target, mask = problem(13, 7, 50)
    expected = run(kl_loss, leaves, target, mask, chunk=4)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        actual = run(kl_loss, leaves, target, mask, chunk=4)
    finally:
        torch.set_default_dtype(previous)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[:2] == expected[:2]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[2], expected[2], strict=True))


def test_gradients_are_kept_in_the_dtype_of_their_inputs():
    leaves, target, mask = problem(13, 7, 50, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        loss, mass, grads = run(kl_loss, leaves, target.double(), mask)
    assert (loss.dtype, mass.dtype) == (torch.float32, torch.float32)
    assert saved == [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_chunks_add_up_in_float32():
    """The gradients of W and b, in bf16, from 512 chunks: rounded once like those from one chunk."""
    leaves, target, mask = problem(512, 8, 30, dtype=torch.bfloat16)
    whole, chunked = (run(kl_loss, leaves, target, mask, chunk=chunk)[2] for chunk in (512, 1))
    for one, many in zip(whole[1:], chunked[1:], strict=True):
        assert (one.double() - many.double()).norm() <= 2**-8 * one.double().norm()


def test_on_the_meta_device():
    """A dry run: the results are where the states are, in float32."""
    hidden, weight = (torch.zeros(n, 4, device="meta", dtype=torch.bfloat16) for n in (6, 50))
    result = kl_loss(hidden, weight, torch.zeros(50, device="meta"), torch.zeros(50, device="meta", dtype=torch.bool))
    for value in result:
        assert (value.device.type, value.shape, value.dtype) == ("meta", (), torch.float32)


def test_autocast_rounds_the_logits_alone():
    """Full fine-tuning in bf16: float32 weights under autocast. At the optimum the loss is 0, not below it."""
    (hidden, weight, bias), target, mask = problem(64, 32, 128, size=2)
    with torch.no_grad():  # everything on the set, so that any rounding of log q shows
        weight[mask] = 0
        bias[:] = torch.where(mask, 24.0, 0.0)
    values = {}
    with torch.autocast("cpu", torch.bfloat16):
        for name, function in (("fused", kl_loss), ("eager", reference.kl_loss)):
            leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
            loss, mass = function(leaves[0], leaves[1], target, mask, bias=leaves[2])
            loss.backward()
            values[name] = (loss.detach(), mass, *(leaf.grad for leaf in leaves))
    assert values["fused"][0] > -1e-6
    for fused, eager in zip(values["fused"], values["eager"], strict=True):
        assert fused.dtype == eager.dtype
        torch.testing.assert_close(fused, eager, rtol=2e-2, atol=2e-4)
    torch.testing.assert_close(values["fused"][0], values["eager"][0], rtol=1e-4, atol=1e-6)


def test_states_in_bf16_over_weights_in_float32():
    """What a model under autocast gives when its last norm keeps bfloat16."""
    (hidden, weight, bias), target, mask = problem(16, 32, 128)
    grads = {}
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [hidden.detach().bfloat16().to(dtype).requires_grad_(), weight.detach().clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = kl_loss(*leaves, target, mask, bias=bias.detach())
        loss.backward()
        grads[dtype] = [leaf.grad for leaf in leaves]
    assert [g.dtype for g in grads[torch.bfloat16]] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads[torch.bfloat16][0].float(), grads[torch.float32][0], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(grads[torch.bfloat16][1], grads[torch.float32][1], rtol=1e-5, atol=1e-7)
