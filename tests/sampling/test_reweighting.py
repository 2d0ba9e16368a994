"""Rates at tilts that were never sampled, against sampling there, and against the closed form."""

import pytest
import torch

from xfactor_peft.base.split_model import split
from xfactor_peft.objective.tilt import Atoms, tilted_atoms
from xfactor_peft.options import RateOptions
from xfactor_peft.sampling import calibration
from xfactor_peft.sampling.calibration import calibrate_tilt
from xfactor_peft.sampling.own_samples import OwnSamples
from xfactor_peft.sampling.reweighting import TiltedSamples
from xfactor_peft.tokens.token_set import TokenSet

TWO = Atoms.of(torch.tensor([[True, True, False, False], [False, True, True, False]]))
"""Overlapping sets: atoms of neither, of both, and of one alone."""


def drawn(masses, generator):
    """Atoms (N, T) drawn from masses (N, T, P)."""
    return torch.multinomial(masses.flatten(0, 1), 1, generator=generator).view(masses.shape[:2])


def feedback_texts(strengths, texts, generator, length=24):
    """Texts of a chain in which a set's token makes its set likelier: masses (N, T, P) and atoms (N, T)."""
    state, found = torch.zeros(texts, 2, dtype=torch.float64), []
    for _ in range(length):
        logits = (state - 3.0) @ TWO.patterns.T + TWO.patterns @ strengths
        masses = logits.softmax(1)
        atoms = drawn(masses[:, None], generator)[:, 0]
        state = 0.7 * state + 0.5 * TWO.patterns[atoms]
        found.append((masses, atoms))
    masses, atoms = zip(*found, strict=True)
    return torch.stack(masses, 1), torch.stack(atoms, 1)


def test_contexts_that_never_drift_give_the_closed_form():
    """With the same masses everywhere the rates are those of the tilted masses, whatever was sampled."""
    generator, samples = torch.Generator().manual_seed(0), TiltedSamples(TWO.patterns)
    base = torch.tensor([0.9, 0.05, 0.02, 0.03], dtype=torch.float64)
    for strengths in torch.tensor([[0.0, 0.0], [2.0, 1.0]]).double():
        masses = tilted_atoms(base[None], TWO.patterns, strengths).expand(200, 30, 4)
        samples.add(strengths, masses, drawn(masses, generator))
    for strengths in torch.tensor([[-1.0, 0.5], [0.5, 0.5], [2.5, 1.5]]).double():
        expected = (tilted_atoms(base[None], TWO.patterns, strengths) @ TWO.patterns)[0]
        found = samples.estimate(strengths)
        torch.testing.assert_close(found.rates, expected, rtol=1e-6, atol=0)
        assert found.errors.max() < 1e-6


def test_contexts_that_drift_are_weighed(tiny):
    """A set that calls for more of itself: a rate between two tilts is that of samples there."""
    tokens = TokenSet.contains(tiny.tokenizer, "e", vocab_size=tiny.vocab_size)
    own = OwnSamples(tiny, split(tiny.model), tokens.mask()[None].float(), 0, RateOptions())
    samples, rates = TiltedSamples(own.atoms.patterns), {}
    for number, strength in enumerate((0.0, 1.5, 3.0)):
        masses, atoms = own.texts(torch.tensor([strength]), 384, number)
        rates[strength] = float(masses.double().mean((0, 1)) @ own.atoms.patterns)
        assert own.atoms.patterns[atoms].mean() == pytest.approx(rates[strength], abs=0.02)
        if strength != 1.5:
            samples.add(torch.tensor([strength]).double(), masses, atoms)
    assert rates[3.0] > rates[1.5] + 0.1 > rates[0.0] + 0.2

    def rate(strength):
        return float(samples.estimate(torch.tensor([strength]).double()).rates)

    assert rate(1.5) == pytest.approx(rates[1.5], abs=0.03)
    assert [rate(0.0), rate(3.0)] == pytest.approx([rates[0.0], rates[3.0]], abs=0.02)


def test_the_standard_error_is_the_spread_of_repetitions():
    where, there = torch.tensor([1.0, 0.5]).double(), torch.tensor([1.3, 0.6]).double()
    found = []
    for seed in range(60):
        samples = TiltedSamples(TWO.patterns)
        samples.add(where, *feedback_texts(where, 64, torch.Generator().manual_seed(seed)))
        found.append(samples.estimate(there))
    odds = torch.stack([estimate.rates for estimate in found]).logit()
    errors = torch.stack([estimate.errors for estimate in found]).mean(0)
    torch.testing.assert_close(errors, odds.std(0), rtol=0.3, atol=0)
    assert 5 < found[0].texts < 64


def calibrated(wanted, start, seed):
    generator, samples, made = torch.Generator().manual_seed(seed), TiltedSamples(TWO.patterns), []

    def measure(strengths, texts, index):
        made.append(texts)
        return samples.add(strengths, *feedback_texts(strengths, texts, generator))

    strengths, trace = calibrate_tilt(measure, samples, start, wanted)
    assert len(trace) == len(made)
    return strengths, made


def test_a_tilt_is_calibrated_on_few_texts():
    """Two overlapping sets at once, from a start that is far off; held against 20,000 fresh texts."""
    wanted, off, texts = torch.tensor([0.2, 0.1]).double(), [], []
    for seed in range(6):
        strengths, made = calibrated(wanted, torch.tensor([3.0, 0.0]).double(), seed)
        masses, _ = feedback_texts(strengths, 20_000, torch.Generator().manual_seed(99))
        off.append((masses.mean((0, 1)) @ TWO.patterns).logit() - wanted.logit())
        texts.append(sum(made))
    assert torch.stack(off).square().mean().sqrt() < 1.5 * calibration.TIGHT
    assert max(texts) <= sum(calibration.ROUNDS)


def test_it_ends_when_the_interval_is_tight(monkeypatch):
    wanted, start = torch.tensor([0.2, 0.1]).double(), torch.tensor([1.5, 0.5]).double()
    monkeypatch.setattr(calibration, "TIGHT", 0.01)
    many = sum(calibrated(wanted, start, 0)[1])
    monkeypatch.setattr(calibration, "TIGHT", 0.2)
    assert sum(calibrated(wanted, start, 0)[1]) < many


def test_a_wanted_zero_is_left_alone():
    start = torch.tensor([1.0, -20.0]).double()
    strengths, _ = calibrated(torch.tensor([0.2, 0.0]).double(), start, 0)
    assert strengths[1] == -20
    assert calibrated(torch.zeros(2).double(), start, 0) == (start, [])
