"""Rates at tilts that were never sampled, against sampling there, and against the closed form."""

import pytest
import torch

from xfactor_peft.base.split_model import split
from xfactor_peft.options import RateOptions
from xfactor_peft.sampling.own_samples import OwnSamples
from xfactor_peft.sampling.reweighting import TiltedSamples
from xfactor_peft.tokens.token_set import TokenSet


def test_contexts_that_never_drift_give_the_closed_form():
    """With one mass everywhere the rate at lambda is m e^lambda / (1 - m + m e^lambda), whatever was sampled."""
    generator, samples = torch.Generator().manual_seed(0), TiltedSamples()
    logit = torch.tensor(-3.0)
    for strength in (0.0, 2.0):
        masses = torch.sigmoid(logit + strength).expand(200, 30)
        samples.add(strength, masses, torch.rand(200, 30, generator=generator) < masses)
    for strength in (-1.0, 0.5, 1.0, 2.5):
        assert samples.rate(strength) == pytest.approx(float(torch.sigmoid(logit + strength)), rel=1e-6)


def test_contexts_that_drift_are_weighed(tiny):
    """A set that calls for more of itself: a rate between two tilts is that of samples there."""
    tokens = TokenSet.contains(tiny.tokenizer, "e", vocab_size=tiny.vocab_size)
    own = OwnSamples(tiny, split(tiny.model), tokens.mask()[None].float(), 0, RateOptions())
    samples, rates = TiltedSamples(), {}
    for number, strength in enumerate((0.0, 1.5, 3.0)):
        masses, hits = own.masses(strength * own.members[0], 384, number)
        rates[strength] = float(masses.double().mean())
        assert hits.float().mean() == pytest.approx(rates[strength], abs=0.02)
        if strength != 1.5:
            samples.add(strength, masses[..., 0], hits[..., 0])
    assert rates[3.0] > rates[1.5] + 0.1 > rates[0.0] + 0.2
    assert samples.rate(1.5) == pytest.approx(rates[1.5], abs=0.03)
    ends = [samples.rate(strength) for strength in (0.0, 3.0)]
    assert ends == pytest.approx([rates[0.0], rates[3.0]], abs=0.02)
