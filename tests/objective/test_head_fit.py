"""The head's fit, against its definition: the rates are met, at the least KL of all heads that meet them."""

import pytest
import torch

from xfactor_peft.objective.head_fit import Contexts, HeadFitter
from xfactor_peft.objective.tilt import SUPPRESS, Atoms

ATOMS = Atoms.of(torch.tensor([[0.0, 1.0]]))
RATE = 0.2


def contexts(states, logits, tilt=0.0):
    """Positions with these states (M, D) and base log-odds (M,) of one set."""
    m = torch.sigmoid(torch.as_tensor(logits))
    masses = torch.zeros(len(m), 2)
    masses[:, ATOMS.of_token] = torch.stack([1 - m, m], dim=1)
    tilts = torch.as_tensor(tilt, dtype=torch.float32).expand(len(m))[:, None]
    return Contexts(states.bfloat16(), masses, tilts)


def families(noise=0.0, size=400):
    """Three kinds of text whose states tell the kind, up to `noise`, with more and less of the set in the base."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for kind, mean in enumerate((-5.0, -4.0, -2.5)):
        states = torch.zeros(size, 6)
        states[:, kind] = 1
        states += noise * torch.randn(size, 6, generator=generator)
        found.append(contexts(states, mean + torch.randn(size, generator=generator)))
    return found


@pytest.mark.parametrize("intercept", [True, False])
def test_where_states_tell_the_family_the_head_is_the_teacher(intercept):
    fitter = HeadFitter(families(), ATOMS, [RATE], intercept=intercept)
    price = fitter.price()
    head = fitter.head(price.teacher, ridge=1e-6)
    for family, wanted in zip(families(), price.teacher, strict=True):
        assert (family.states.float() @ head[0].T + head[1] - wanted).abs().max() < 0.02
        assert float(fitter.rates(family, *head)) == pytest.approx(RATE, abs=1e-3)
    assert price.kl == pytest.approx(price.kl_of_teacher, rel=5e-3)
    assert (price.rates_of_constant - RATE).abs().max() > 0.1  # the control: one constant does not
    assert float(price.rates_of_constant.mean()) == pytest.approx(RATE, abs=1e-6)
    assert price.kl_of_constant < price.kl_of_teacher
    assert head[1].any() == intercept


def test_no_head_with_the_same_rates_costs_less():
    """At the optimum the gradient of KL is a combination of those of the rates, which its conditions say and no more.

    v is that of the tilt that texts were sampled under, so it is exact where this is the head's own.
    """
    plain = families(noise=0.5)
    fitter, parts = HeadFitter(plain, ATOMS, [RATE], intercept=True), plain
    tilts = fitter.price().teacher
    for _ in range(30):
        direction, offset = fitter.head(tilts, ridge=1e-9)
        own = [p.states.float() @ direction.T + offset for p in plain]
        parts = [Contexts(p.states, p.masses, tilt) for p, tilt in zip(plain, own, strict=True)]
        fitter = HeadFitter(parts, ATOMS, [RATE], intercept=True)
    a, b = (x.double().requires_grad_() for x in (direction, offset))
    kls, rates = [], []
    for part in parts:
        tilt = part.states.double() @ a.T + b
        q = (part.masses.double().log() + tilt @ ATOMS.patterns.T).softmax(1)
        kls.append(torch.special.xlogy(q, q / part.masses.double()).sum(1).mean())
        rates.append((q @ ATOMS.patterns).mean())

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (a, b), retain_graph=True)])

    of_rates = torch.stack([gradient(rate) for rate in rates], dim=1)
    of_kl = gradient(sum(kls))
    left = of_kl - of_rates @ torch.linalg.lstsq(of_rates, of_kl[:, None]).solution[:, 0]
    assert left.norm() < 0.01 * of_kl.norm()
    assert of_kl.norm() > 0.1


def test_without_an_offset_a_direction_in_which_all_states_are_alike_takes_its_place():
    def with_constant(part, value):
        states = torch.cat([part.states, torch.full((len(part.states), 1), value).bfloat16()], dim=1)
        return Contexts(states, part.masses, part.tilt)

    noisy = families(noise=0.5)
    free = HeadFitter(noisy, ATOMS, [RATE], intercept=True).price()
    held = HeadFitter([with_constant(part, 8.0) for part in noisy], ATOMS, [RATE], intercept=False).price()
    assert held.kl == pytest.approx(free.kl, rel=0.02)
    without = HeadFitter(noisy, ATOMS, [RATE], intercept=False).price()
    assert without.kl > 1.1 * held.kl


def test_a_set_that_is_never_wanted_is_silent_everywhere():
    atoms = Atoms.of(torch.tensor([[0.0, 1, 0], [0, 0, 1.0]]))
    generator = torch.Generator().manual_seed(1)
    parts = []
    for kind in range(3):
        states = torch.nn.functional.one_hot(torch.full((200,), kind), 4).bfloat16()
        masses = torch.tensor([[0.9, 0.05, 0.05]]) + 0.01 * torch.rand(200, 3, generator=generator)
        ordered = torch.empty(200, 3)
        ordered[:, atoms.of_token] = masses / masses.sum(1, keepdim=True)
        parts.append(Contexts(states, ordered, torch.zeros(200, 2)))
    fitter = HeadFitter(parts, atoms, [RATE, 0.0], intercept=True)
    price = fitter.price()
    direction, offset = fitter.head(price.teacher)
    for part in parts:
        rates = fitter.rates(part, direction, offset)
        assert float(rates[0]) == pytest.approx(RATE, abs=2e-3)
        assert float(rates[1]) < 1e-6
        assert (part.states.float() @ direction.T + offset)[:, 1].max() < SUPPRESS + 0.5


def test_a_family_left_out_is_predicted_by_one_like_it():
    """Two families are alike; what a third, strange one needs nobody can tell."""
    low, _, high = families(noise=0.1)
    fitter = HeadFitter([low, families(noise=0.1)[0], high], ATOMS, [RATE], intercept=True)
    missed = fitter.left_out(fitter.price().teacher, 1e-2).abs().flatten()
    assert missed[:2].max() < 0.1
    assert missed[2] > 0.5
