"""The loss over a packed output embedding against its eager twin: all logits at once, in float64."""

from dataclasses import replace

import pytest
import torch

from xfactor_peft.lowmem import gguf_layers
from xfactor_peft.lowmem.gguf_formats import BY_NAME
from xfactor_peft.lowmem.gguf_layers import PackedMatrix
from xfactor_peft.objective.kl import Teacher, kl_loss, tilted_kl_loss
from xfactor_peft.objective.sequence_level import Worth, position_gradients

WIDTH, TOKENS, POSITIONS = 32, 50, 13


@pytest.fixture(params=[1, 7, 50])
def parts(request, monkeypatch):
    """A packed W of 50 rows, in pieces of 1, 7 and 50; states, a teacher's states, bias, two sets, their term."""
    monkeypatch.setattr(gguf_layers, "PIECE", request.param * WIDTH)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    packed = torch.randint(0, 256, (TOKENS, 34), generator=generator, dtype=torch.uint8)
    packed[:, :2] = (0.02 * normal(TOKENS, 1)).half().view(torch.uint8)
    matrix = PackedMatrix(packed, BY_NAME["Q8_0"], WIDTH, torch.float64)
    members = torch.zeros(2, TOKENS, dtype=torch.float64)
    members[0, 3:9] = members[1, [20, 49]] = 1
    return matrix, normal(POSITIONS, WIDTH), normal(POSITIONS, WIDTH), normal(TOKENS), members, normal(POSITIONS, 2)


def eager(log_p, z, members):
    """KL(p || softmax z), mean over positions, and the masses."""
    log_q = z.log_softmax(1)
    return (torch.where(log_p.exp() > 0, log_p.exp() * (log_p.clamp_min(-1e30) - log_q), 0)).sum(1).mean(), (
        log_q.exp() @ members.T
    ).mean(0)


def test_a_fixed_target(parts):
    matrix, hidden, _, bias, members, _ = parts
    target = members[0] / members[0].sum()
    inputs = hidden.requires_grad_(), bias.requires_grad_()
    loss, mass = kl_loss(hidden, matrix, target, members[0].bool(), bias=bias)
    found = torch.autograd.grad(2 * loss, inputs)
    z = hidden @ matrix.unpacked(torch.float64).T + bias
    wanted, wanted_mass = eager(target.log().expand(POSITIONS, -1), z, members)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(mass, wanted_mass[0], atol=1e-12, rtol=1e-12)
    for one, other in zip(found, torch.autograd.grad(2 * wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
        assert other.abs().max() > 1e-3


def test_a_tilted_teacher(parts):
    matrix, hidden, states, bias, members, term = parts
    tilt = members.T @ torch.tensor([1.5, -3.0], dtype=torch.float64)
    inputs = hidden.requires_grad_(), bias.requires_grad_(), term.requires_grad_()
    loss, mass = tilted_kl_loss(hidden, matrix, Teacher(states, tilt), members, bias=bias, set_logits=term)
    found = torch.autograd.grad(2 * loss, inputs)
    w = matrix.unpacked(torch.float64)
    log_p = (states @ w.T + bias.detach() + tilt).log_softmax(1)
    wanted, wanted_mass = eager(log_p, hidden @ w.T + bias + term @ members, members)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(mass, wanted_mass, atol=1e-12, rtol=1e-12)
    for one, other in zip(found, torch.autograd.grad(2 * wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
        assert other.abs().max() > 1e-3


def test_bfloat16_is_as_near_as_a_whole_embedding_is(parts):
    """Error against float64 at most that of the chunked loss with W unpacked, and a little."""
    matrix, hidden, _, _, members, _ = parts
    target = members[0] / members[0].sum()
    errors = []
    exact = kl_loss(hidden, matrix, target, members[0].bool()).loss
    for weight in (matrix, matrix.unpacked(torch.bfloat16)):
        loss = kl_loss(hidden.bfloat16(), weight, target.float(), members[0].bool()).loss
        errors.append(abs(float(loss) - float(exact)))
    assert errors[0] <= errors[1] + 1e-3


def test_gradients_of_whole_texts_are_those_of_the_unpacked_weight(parts):
    """And of one without bias and set head; what autograd says of the unpacked one is in test_tilted_loss.py."""
    matrix, hidden, states, bias, members, term = (
        part.float() if isinstance(part, torch.Tensor) else replace(part, dtype=torch.float32) for part in parts
    )
    hidden, states = 0.2 * hidden, 0.2 * states  # logits of the size of a model's
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS, (POSITIONS,), generator=generator)
    strengths = torch.randn(POSITIONS, 2, generator=generator)
    head, none = {"bias": bias, "set_logits": term}, {"bias": None, "set_logits": None}
    for more, price in ((head, 0.0), (none, 0.0), (head, 0.7)):
        one, other = (
            position_gradients(hidden, states, weight, ids, worth=Worth(members, strengths, price), **more)
            for weight in (matrix, matrix.unpacked(torch.float32))
        )
        for name, found, wanted in zip(one._fields, one, other, strict=True):
            torch.testing.assert_close(
                found, wanted, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert wanted.abs().max() > 1e-3 or (name == "outside" and not price)
