"""The head's fit, against its definition: the rate holds in every piece, at the least KL from the teacher."""

import math

import pytest
import torch

from xfactor_peft.objective.head_fit import EXCESSES, MOST_PRICE, Contexts, HeadFitter, price
from xfactor_peft.objective.tilt import SUPPRESS, Atoms, bounded_tilts, piece_tilts, solve_rates

ATOMS = Atoms.of(torch.tensor([[0.0, 1.0]]))
RATE, PIECE = 0.2, 20


def contexts(states, logits):
    """Pieces of positions with these states (M, D) and base log-odds (M,) of one set."""
    m = torch.sigmoid(torch.as_tensor(logits))
    masses = torch.zeros(len(m), 2)
    masses[:, ATOMS.of_token] = torch.stack([1 - m, m], dim=1)
    return Contexts(states.bfloat16().view(-1, PIECE, states.shape[1]), masses.view(-1, PIECE, 2))


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


EXCESS = 0.3


def fitted(parts, rates=(RATE,), atoms=ATOMS, intercept=True, rounds=1):
    fitter = HeadFitter(atoms, rates, intercept=intercept)
    for _ in range(rounds):
        fitter.add(parts)
    return fitter.with_excess(EXCESS)


def rates_in(part, head, atoms=ATOMS):
    return part.tilted(part.tilts(*head), atoms.patterns) @ atoms.patterns


def test_every_piece_gets_its_own_tilt():
    """Against the solver of one set of contexts, for two sets that overlap and one that is never due."""
    atoms = Atoms.of(torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    generator = torch.Generator().manual_seed(3)
    masses = (2 * torch.randn(7, PIECE, 4, generator=generator)).double().softmax(2)
    rates = torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64)
    tilts = piece_tilts(masses, atoms.patterns, rates)
    for piece, tilt in zip(masses, tilts, strict=True):
        torch.testing.assert_close(tilt, solve_rates(piece, atoms.patterns, rates.tolist()), atol=2e-3, rtol=0)
    plain = bounded_tilts(masses, atoms.patterns, rates, torch.full_like(tilts, 50.0))
    everything = solve_rates(masses.flatten(0, 1), atoms.patterns, rates.tolist())
    torch.testing.assert_close(plain, everything.expand_as(plain), atol=2e-3, rtol=0)


def test_the_teacher_is_the_nearest_with_its_moment_and_its_bounds():
    """Complementary slackness, by its definition: one tilt for all pieces below their bound, less only at the bound."""
    bound = 1.5 * RATE
    masses = torch.cat([part.masses for part in families()]).double()
    least = piece_tilts(masses, ATOMS.patterns, torch.tensor([bound], dtype=torch.float64))
    tilts = bounded_tilts(masses, ATOMS.patterns, torch.tensor([RATE], dtype=torch.float64), least)
    rates = (masses.log() + (tilts @ ATOMS.patterns.T)[:, None]).softmax(2) @ ATOMS.patterns
    pieces = rates.mean(1)[:, 0]
    assert float(pieces.mean()) == pytest.approx(RATE, abs=1e-4)
    assert pieces.max() < bound + 1e-3
    bounded = pieces > bound - 1e-3
    assert 0 < bounded.sum() < len(pieces)
    free = tilts[~bounded, 0]
    assert free.max() - free.min() < 1e-6
    assert (tilts[bounded, 0] < free[0] + 1e-6).all()


@pytest.mark.parametrize("intercept", [True, False])
def test_where_states_tell_the_piece_the_head_is_the_teacher(intercept, monkeypatch):
    monkeypatch.setattr("xfactor_peft.objective.head_fit.RIDGE", 1e-6)
    parts = families()
    for kind, part in enumerate(parts):  # all pieces of a kind alike
        parts[kind] = Contexts(part.states, part.masses[:1].expand_as(part.masses).contiguous())
    head = fitted(parts, intercept=intercept)
    cost = price(parts, ATOMS, *head)
    for part, wanted in zip(parts, cost.teacher, strict=True):
        assert (part.tilts(*head) - wanted).abs().max() < 0.02
        assert float(rates_in(part, head).mean()) == pytest.approx(RATE, abs=1e-3)
    assert cost.kl == pytest.approx(cost.kl_of_teacher, rel=5e-3)
    assert (cost.rates_of_constant - RATE).abs().max() > 0.1  # the control: one constant does not
    assert float(cost.rates_of_constant.mean()) == pytest.approx(RATE, abs=1e-3)
    assert cost.kl_of_constant < cost.kl_of_teacher
    assert head[1].any() == intercept


def test_the_rate_holds_on_average_whatever_states_tell():
    noisy = families(noise=0.5)
    head = fitted(noisy)
    assert float(torch.cat([rates_in(part, head) for part in noisy]).mean()) == pytest.approx(RATE, abs=1e-4)
    assert torch.equal(fitted(noisy)[0], head[0])
    torch.testing.assert_close(fitted(noisy, rounds=3)[0], head[0], atol=1e-4, rtol=1e-3)  # the same texts again


def test_no_head_with_the_same_rate_is_nearer_the_teacher():
    """KL of the head from the teacher, by its definition: it rises along every direction that keeps the mean rate."""
    noisy = families(noise=0.3)
    head = [x.double().requires_grad_() for x in fitted(noisy)]
    far, rates = [], []
    for part in noisy:
        base = part.masses.flatten(0, 1).double().log()
        wanted = torch.tensor([RATE], dtype=torch.float64)
        bounds = piece_tilts(part.masses.double(), ATOMS.patterns, wanted) + EXCESS
        lambdas = bounded_tilts(part.masses.double(), ATOMS.patterns, wanted, bounds)
        teacher = base + lambdas.repeat_interleave(PIECE, dim=0) @ ATOMS.patterns.T
        tilt = part.states.flatten(0, 1).double() @ head[0].T + head[1]
        q = (base + tilt @ ATOMS.patterns.T).log_softmax(1)
        p = teacher.log_softmax(1)
        far.append((p.exp() * (p - q)).sum(1).mean())
        rates.append((q.exp() @ ATOMS.patterns).mean())

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, head, retain_graph=True)])

    of_rate, of_kl = gradient(sum(rates)), gradient(sum(far))
    plain = gradient(rates[0])  # what a gradient here looks like
    left = of_kl - of_rate * (of_kl @ of_rate) / of_rate.square().sum()
    assert left.norm() < 0.15 * plain.norm()


def test_a_text_full_of_the_set_is_told_to_stop():
    """Half of the pieces have come to say little else, and states tell it: a constant lets them go on."""
    generator = torch.Generator().manual_seed(2)
    full = (torch.arange(40) % 2 == 1).repeat_interleave(PIECE)
    states = torch.stack([full.float(), torch.randn(len(full), generator=generator)], dim=1)
    part = contexts(states, torch.where(full, 2.0, -5.0) + torch.randn(len(full), generator=generator))
    head = fitted([part])
    assert RATE < rates_in(part, head).view(-1, PIECE).mean(1)[1::2].mean() < RATE * math.exp(EXCESS)
    constant = solve_rates(part.masses.flatten(0, 1).double(), ATOMS.patterns, [RATE])
    pieces = part.tilted(constant, ATOMS.patterns) @ ATOMS.patterns
    assert pieces.view(-1, PIECE).mean(1)[1::2].mean() > 1.9 * RATE


def test_pieces_are_held_as_tightly_as_costs_little():
    """Texts that are alike are held at R; where they differ much, as tightly as the price allows."""
    generator = torch.Generator().manual_seed(4)
    piece = torch.randn(40, generator=generator).repeat_interleave(PIECE)
    states = torch.stack([piece, torch.randn(len(piece), generator=generator)], dim=1)
    for differ, tightest in ((0.2, True), (2.0, False)):
        parts = [contexts(states, differ * piece - 4 + torch.randn(len(piece), generator=generator))]
        fitter = HeadFitter(ATOMS, (RATE,), intercept=True)
        fitter.add(parts)
        heads = [fitter.with_excess(excess) for excess in EXCESSES]
        prices = [price(parts, ATOMS, *head).ratio for head in heads]
        assert prices == sorted(prices, reverse=True)
        first = next((i for i, ratio in enumerate(prices) if ratio <= MOST_PRICE), len(prices) - 1)
        assert torch.equal(fitter.head()[0], heads[first][0])
        assert (first == 0) == tightest


def test_without_an_offset_a_direction_in_which_all_states_are_alike_takes_its_place(monkeypatch):
    monkeypatch.setattr("xfactor_peft.objective.head_fit.RIDGE", 1e-6)

    def with_constant(part, value):
        return Contexts(torch.cat([part.states, torch.full_like(part.states[..., :1], value)], dim=2), part.masses)

    def kl(parts, intercept):
        return price(parts, ATOMS, *fitted(parts, intercept=intercept)).kl

    noisy = families(noise=0.5)
    free = kl(noisy, intercept=True)
    assert kl([with_constant(part, 8.0) for part in noisy], intercept=False) == pytest.approx(free, rel=0.02)
    assert kl(noisy, intercept=False) > 1.1 * free


def test_a_set_that_is_never_wanted_is_silent_everywhere():
    atoms = Atoms.of(torch.tensor([[0.0, 1, 0], [0, 0, 1.0]]))
    generator = torch.Generator().manual_seed(1)
    parts = []
    for kind in range(3):
        states = torch.nn.functional.one_hot(torch.full((200,), kind), 4).bfloat16()
        masses = torch.tensor([[0.9, 0.05, 0.05]]) + 0.01 * torch.rand(200, 3, generator=generator)
        ordered = torch.empty(200, 3)
        ordered[:, atoms.of_token] = masses / masses.sum(1, keepdim=True)
        parts.append(Contexts(states.view(-1, PIECE, 4), ordered.view(-1, PIECE, 3)))
    head = fitted(parts, [RATE, 0.0], atoms)
    for part in parts:
        rates = rates_in(part, head, atoms).mean(0)
        assert float(rates[0]) == pytest.approx(RATE, abs=2e-3)
        assert float(rates[1]) < 1e-6
        assert part.tilts(*head)[:, 1].max() < SUPPRESS + 0.5
    assert price(parts, atoms, *head).teacher[:, 1].tolist() == [SUPPRESS] * 3
