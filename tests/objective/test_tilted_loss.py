"""The chunked tilted loss against its eager twin, gradcheck, and the exact policy gradient against autograd."""

import pytest
import torch
from torch.nn import functional as F

from xfactor_peft.objective import reference
from xfactor_peft.objective.kl import Teacher, tilted_kl_loss
from xfactor_peft.objective.sequence_level import Worth, advantages, position_gradients

SHAPES = [(7, 13, 101), (16, 8, 64), (5, 32, 507)]


def case(n, d, v, dtype=torch.float64, sets=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    members = torch.zeros(sets, v, dtype=dtype)
    for k in range(sets):
        members[k, 3 * k : 3 * k + 7] = 1
    tilt = torch.tensor([1.5, -0.5], dtype=dtype)[:sets] @ members
    return {
        "hidden": normal(n, d), "weight": normal(v, d), "teacher": Teacher(normal(n, d), tilt), "members": members,
        "bias": normal(v), "set_logits": normal(n, sets),
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_equals_the_eager_twin(shape, chunk):
    values = case(*shape)
    names = ("hidden", "set_logits", "weight", "bias")
    for name in names:
        values[name].requires_grad_()
    ours = tilted_kl_loss(**values, chunk=chunk)
    got = torch.autograd.grad(ours.loss, [values[name] for name in names])
    teacher = Teacher(*(t.detach() for t in values["teacher"]))
    # The twin's gradient for W would flow through the teacher as well; the teacher is a constant.
    z = F.linear(values["hidden"], values["weight"], values["bias"]) + values["set_logits"] @ values["members"]
    with torch.no_grad():
        log_p = (F.linear(teacher.hidden, values["weight"], values["bias"]) + teacher.tilt).log_softmax(1)
    loss = (log_p.exp() * (log_p - z.log_softmax(1))).sum(1).mean()
    expected = torch.autograd.grad(loss, [values[name] for name in names])
    twin, mass = reference.tilted_kl_loss(**{k: v.detach() if k != "teacher" else teacher for k, v in values.items()})
    torch.testing.assert_close(ours.loss, twin)
    torch.testing.assert_close(ours.loss, loss)
    torch.testing.assert_close(ours.set_mass, mass)
    for ours_grad, grad in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_grad, grad)


def test_gradcheck():
    values = case(5, 4, 23)
    hidden, set_logits = values.pop("hidden").requires_grad_(), values.pop("set_logits").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, s: tilted_kl_loss(h, set_logits=s, **values, chunk=2).loss, (hidden, set_logits)
    )


def test_a_head_at_lambda_has_no_loss_and_without_one_it_has():
    values = case(6, 8, 50)
    values["hidden"] = values["teacher"].hidden
    values["set_logits"] = torch.tensor([1.5, -0.5]).double().expand(6, 2)
    assert tilted_kl_loss(**values).loss.abs() < 1e-12
    values["set_logits"] = None
    assert tilted_kl_loss(**values).loss > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(0, 8)}, "^tilted_kl_loss needs at least one position$"),
        ({"hidden": torch.zeros(3, 8)}, r"^teacher has \(6, 8\) states, the student \(3, 8\)$"),
        ({"members": torch.zeros(2, 49)}, r"^members \(2, 49\) and tilt \(50,\) need 50 tokens$"),
        ({"weight": torch.zeros(49, 8)}, r"^members \(2, 50\) and tilt \(50,\) need 49 tokens$"),
    ],
)
def test_shapes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        tilted_kl_loss(**{**case(6, 8, 50, torch.float32), **change})


def test_any_leading_dimensions():
    values = case(6, 8, 50)
    flat = tilted_kl_loss(**values)
    values["hidden"], values["set_logits"] = values["hidden"].view(2, 3, 8), values["set_logits"].view(2, 3, 2)
    assert tilted_kl_loss(**values).loss == flat.loss


def test_bf16_is_close_to_the_exact_loss():
    low = case(64, 8, 50, torch.bfloat16)
    high = {k: v.double() for k, v in low.items() if k != "teacher"}
    high["teacher"] = Teacher(*(t.double() for t in low["teacher"]))
    names = ("hidden", "set_logits")
    for values in (low, high):
        for name in names:
            values[name].requires_grad_()
    ours, exact = tilted_kl_loss(**low, chunk=5), tilted_kl_loss(**high)
    assert ours.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    grads = [torch.autograd.grad(r.loss, [v[n] for n in names]) for r, v in ((ours, low), (exact, high))]
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() <= 0.02 * expected.norm()


def test_what_needs_no_gradient_saves_none():
    values, saved = case(6, 8, 50), []
    values["hidden"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        tilted_kl_loss(**values)
    assert saved == [(6, 8)]


def test_the_teacher_is_in_float32_or_better():
    """bf16 states make bf16 logits; what follows is not rounded again, whatever the dtype of the tilt."""
    low, high = case(6, 8, 50, torch.bfloat16), case(6, 8, 50)
    logits = F.linear(low["teacher"].hidden[2:5], low["weight"], low["bias"])
    log_q = low["teacher"].tilted(logits.float(), slice(2, 5)).log_softmax(1)
    assert (log_q.shape, log_q.dtype) == ((3, 50), torch.float32)
    z = F.linear(low["teacher"].hidden[2:5], low["weight"], low["bias"]).double() + low["teacher"].tilt.double()
    torch.testing.assert_close(log_q.double(), z.log_softmax(1), rtol=1e-6, atol=1e-6)
    logits = F.linear(high["teacher"].hidden, high["weight"])
    log_q = high["teacher"].tilted(logits.clone(), slice(0, 6)).log_softmax(1)
    assert log_q.dtype == torch.float64
    z = logits + high["teacher"].tilt
    torch.testing.assert_close(log_q, z.log_softmax(1))


@pytest.mark.parametrize("price", [0.0, 0.7])
def test_position_gradients_are_those_of_autograd(price):
    """The exact immediate part and the score part, against the surrogate written out with whole tensors."""
    values = case(9, 6, 40, torch.float32)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(40, (9,), generator=generator)
    strengths = torch.randn(9, 2, generator=generator)
    advantage = torch.randn(9, generator=generator)
    hidden, s = values["hidden"].requires_grad_(), values["set_logits"].requires_grad_()
    weight, bias, members = values["weight"], values["bias"], values["members"]
    out = position_gradients(
        hidden.detach(), values["teacher"].hidden, weight, ids,
        bias=bias, set_logits=s.detach(), worth=Worth(members, strengths, price),
    )  # fmt: skip
    log_pi = (F.linear(hidden, weight, bias) + s @ members).log_softmax(1)
    log_p = F.linear(values["teacher"].hidden, weight, bias).log_softmax(1)
    pi = log_pi.exp()
    kl = (pi * (log_pi - log_p)).sum(1)
    mass = pi @ members.T
    others = members.amax(0) == 0
    among, base_among = (one[:, others].log_softmax(1) for one in (log_pi, log_p))
    outside = (pi[:, others] * (among - base_among)).sum(1)
    assert outside.min() > 0.1
    torch.testing.assert_close(out.outside, outside.detach() if price else torch.zeros(9))
    surrogate = (
        (mass * strengths).sum(1) - kl - price * outside + advantage * log_pi.gather(1, ids[:, None]).squeeze(1)
    ).sum()
    expected_hidden, expected_set = torch.autograd.grad(surrogate, [hidden, s])
    torch.testing.assert_close(out.kl, kl.detach())
    torch.testing.assert_close(out.mass, mass.detach())
    got = out.now_hidden + advantage[:, None] * out.score_hidden
    torch.testing.assert_close(got, expected_hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.now_set + advantage[:, None] * out.score_set, expected_set, atol=1e-4, rtol=1e-4)


def test_a_policy_that_says_nothing_but_the_set_has_finite_gradients():
    """Its mass outside underflows."""
    values = case(9, 6, 40, torch.float32)
    members, hidden = values["members"], values["hidden"]
    worth = Worth(members, torch.ones(9, 2), 0.7)
    out = position_gradients(
        hidden, values["teacher"].hidden, values["weight"], torch.zeros(9, dtype=torch.long),
        bias=values["bias"], set_logits=torch.full((9, 2), 400.0), worth=worth,
    )  # fmt: skip
    assert out.mass.amax(1).min() > 0.999
    for part in out:
        assert torch.isfinite(part).all()
    assert out.outside.abs().max() < 1e-6


def test_advantages_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, 3.0, 1.0]])
    full, targets = advantages(rewards, values, 1.0)
    assert targets.tolist() == [[7.0, 6.0, 4.0]]  # what is still to come, the present included
    assert full.tolist() == [[2.0, 3.0, 3.0]]
    short, _ = advantages(rewards, values, 0.0)
    assert short.tolist() == [[1 + 3 - 5, 2 + 1 - 3, 4 - 1]]
