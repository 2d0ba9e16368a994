"""The tilt's mathematics: hand-worked cases, optimality, solving for rates, and the refusals."""

import math

import pytest
import torch

from tests.objective.one_set import solve_rate, tilt_kl, tilted_mass
from tests.tiny import tiny_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.goals import parse_goal
from xfactor_peft.objective.targets import Goal, TiltedTarget
from xfactor_peft.objective.tilt import SUPPRESS, Atoms, solve_rates, tilted_atoms
from xfactor_peft.sampling.calibration import calibrate
from xfactor_peft.sampling.dial import scale_for_rate
from xfactor_peft.tokens.token_set import TokenSet


def masses(n=50, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.2 + 1e-4


def test_three_tokens_by_hand():
    """p = (1/2, 1/4, 1/4), S = {0}, e^lambda = 3: q = (3/4, 1/8, 1/8)."""
    m = torch.tensor([0.5], dtype=torch.float64)
    assert tilted_mass(m, math.log(3)).item() == pytest.approx(0.75)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert tilt_kl(m, math.log(3)).item() == pytest.approx(expected)


def test_known_prices():
    """From 1 % in every context: 10 % costs 0.144 nats, 50 % 1.61, and the whole 4.61."""
    m = torch.full((1,), 0.01, dtype=torch.float64)
    for rate, price in ((0.10, 0.144), (0.50, 1.614), (1 - 1e-9, 4.605)):
        assert tilt_kl(m, solve_rate(m, rate)).item() == pytest.approx(price, abs=2e-3)


def test_zero_strength_is_the_base_and_mass_grows():
    m = masses()
    torch.testing.assert_close(tilted_mass(m, 0.0), m)
    assert tilt_kl(m, 0.0).abs().max() < 1e-12
    assert (tilted_mass(m, 1.0) > m).all()
    assert (tilted_mass(m, -1.0) < m).all()
    assert (tilt_kl(m, -2.0) >= 0).all()


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3, 0.9, 0.999])
def test_solved_strength_gives_the_rate(rate):
    m = masses()
    assert tilted_mass(m, solve_rate(m, rate)).mean().item() == pytest.approx(rate, abs=1e-9)


def test_one_strength_for_all_contexts_is_cheaper_than_one_mass_for_all():
    """The I-projection: at equal mean mass, no other way of spreading it over contexts costs less."""
    m = masses()
    strength = solve_rate(m, 0.3)
    best = tilt_kl(m, strength).mean()
    for seed in range(5):
        noise = torch.randn(len(m), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        lam = strength + 0.5 * noise
        shift = solve_rate(torch.sigmoid(torch.logit(m) + 0.5 * noise), 0.3)
        lam = shift + 0.5 * noise
        q = torch.sigmoid(torch.logit(m) + lam)
        cost = (q * (q / m).log() + (1 - q) * ((1 - q) / (1 - m)).log()).mean()
        assert q.mean().item() == pytest.approx(0.3, abs=1e-8)
        assert cost > best


def test_never_is_a_fixed_strength():
    assert tilted_mass(masses(), SUPPRESS).max() < 1e-8


def overlapping(seed=0, contexts=40, vocabulary=60):
    generator = torch.Generator().manual_seed(seed)
    log_p = (2 * torch.randn(contexts, vocabulary, generator=generator)).log_softmax(1)
    members = torch.zeros(3, vocabulary)
    members[0, :10], members[1, 5:20], members[2, 30:33] = 1, 1, 1
    return log_p, members


def test_atoms_partition_the_vocabulary():
    log_p, members = overlapping()
    atoms = Atoms.of(members)
    assert len(atoms.patterns) == 5
    m = atoms.masses(log_p)
    torch.testing.assert_close(m.sum(1), torch.ones(len(m), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(m @ atoms.patterns, (log_p.exp() @ members.T).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rates", [[0.1, 0.3, 0.05], [0.5, 0.6, 0.2], [0.01, 0.02, 0.9], [0.2, 0.1, 0.0]])
def test_overlapping_goals_are_solved_together(rates):
    log_p, members = overlapping()
    atoms = Atoms.of(members)
    m = atoms.masses(log_p)
    strengths = solve_rates(m, atoms.patterns, rates)
    reached = (tilted_atoms(m, atoms.patterns, strengths) @ atoms.patterns).mean(0)
    torch.testing.assert_close(reached, torch.tensor(rates, dtype=torch.float64), atol=1e-6, rtol=0)
    # the same through whole logits
    q = (log_p.double() + strengths @ members.double()).softmax(1)
    torch.testing.assert_close((q @ members.T.double()).mean(0), reached, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3, 0.9, 0.999])
def test_newton_agrees_with_bisection(rate):
    m = masses()
    two = torch.stack([1 - m, m], dim=1)
    solved = solve_rates(two, torch.tensor([[0.0], [1.0]], dtype=torch.float64), [rate])
    assert solved.item() == pytest.approx(solve_rate(m, rate), abs=1e-6)


def test_rates_that_cannot_be_met_together():
    log_p, members = overlapping()
    atoms = Atoms.of(members[[0, 2]])
    with pytest.raises(XFactorError, match="together"):
        solve_rates(atoms.masses(log_p), atoms.patterns, [0.7, 0.6])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_impossible_rates(rate):
    with pytest.raises(XFactorError, match=r"`goal.rate`"):
        Goal(TokenSet((1,), 5), rate)


def test_goal_needs_a_rate_or_a_strength():
    tokens = TokenSet((1,), 5)
    for values in ({}, {"rate": 0.1, "strength": 1.0}):
        with pytest.raises(XFactorError, match=r"either `goal.rate` or `goal.strength`"):
            Goal(tokens, **values)
    with pytest.raises(XFactorError, match=r"`goal.strength` must be"):
        Goal(tokens, strength=math.inf)


def test_tilted_target_refuses_what_makes_no_sense():
    one, other = TokenSet((1,), 5), TokenSet((2,), 5)
    for goals, message in (
        ((), "at least one goal"),
        ((Goal(one, 0.1), Goal(TokenSet((1,), 6), 0.1)), "one vocabulary"),
        ((Goal(one, 0.1), Goal(one, 0.2)), "the same tokens"),
        ((Goal(one, 0.1), Goal(other, strength=1.0)), "every goal a rate"),
    ):
        with pytest.raises(XFactorError, match=message):
            TiltedTarget(goals)


def test_goals_as_text():
    tokenizer = tiny_tokenizer()
    texts = ("contains:X=0.10", "regex:^ ?[Zz]=0.05", "contains:q=0")
    target = TiltedTarget(tuple(parse_goal(text, tokenizer) for text in texts))
    assert target.rates == [0.10, 0.05, 0.0]
    assert target.tokens == TokenSet.contains(tokenizer, "X")
    assert parse_goal("contains:X=0.5", tokenizer, ignore_case=True).tokens == TokenSet.contains(
        tokenizer, "X", ignore_case=True
    )


@pytest.mark.parametrize(
    "text", ["X=0.1", "contains:X", "contains:=0.1", "likes:X=0.1", "contains:X=lots", "contains:X=2"]
)
def test_bad_goals(text):
    with pytest.raises(XFactorError, match=r"^`goal`"):
        parse_goal(text, tiny_tokenizer())


def test_dial_inverts_its_pairs():
    strengths = [0.0, 0.25, 0.5, 0.75, 1.0]
    dial = [(s, 1 / (1 + math.exp(5 - 4 * s))) for s in strengths]
    for scale, rate in dial[1:-1]:
        assert scale_for_rate(dial, rate) == pytest.approx(scale)
    assert scale_for_rate(dial, 1 / (1 + math.exp(5 - 4 * 0.6))) == pytest.approx(0.6)
    with pytest.raises(XFactorError, match="outside what"):
        scale_for_rate(dial, 0.9)
    with pytest.raises(XFactorError, match="holds no dial"):
        scale_for_rate([], 0.1)
    with pytest.raises(XFactorError, match=r"^`rate` must be above 0"):
        scale_for_rate(dial, 0.0)


def test_calibration_averages_over_rounds():
    """A noisy, drifting response: the error is that of all rounds together, and a wanted 0 is left alone."""
    rates, errors = torch.tensor([0.1, 0.0]).double(), []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)

        def measure(offset, index, generator=generator):
            noise = 0.05 * torch.randn(2, generator=generator, dtype=torch.float64)
            return torch.sigmoid(1.4 * offset - 6.0 + noise)

        offset, trace = calibrate(measure, torch.tensor([3.0, -20.0]).double(), rates)
        assert 3 <= len(trace) <= 7
        assert offset[1] == -20
        errors.append(abs(float(torch.sigmoid(1.4 * offset[0] - 6.0)) - 0.1))
    assert sum(errors) / len(errors) < 0.0035
    assert max(errors) < 0.008
