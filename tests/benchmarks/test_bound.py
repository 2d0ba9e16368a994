"""Bounds of log Z against every text there is, on a model whose texts can be counted."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from bench.rate import bound
from bench.rate.bound import Potential, Sampler, Texts, dual

import xfactor_peft as xf

LENGTH, PROMPT = 3, "a b"


@pytest.fixture(scope="module")
def sampler(tiny_folders) -> Sampler:
    base = xf.load(str(tiny_folders["gpt2"]), xf.LoadOptions(dtype="fp32"), offline=True)
    found = Sampler(base, xf.TokenSet.contains(base.tokenizer, "e", vocab_size=base.vocab_size), LENGTH)
    members = found.mask.nonzero().flatten()[:8]
    others = (~found.mask).nonzero().flatten()[40:60]
    allowed = torch.cat([members, others])  # few enough for every text to be looked at
    found.never = torch.ones(base.vocab_size).index_fill_(0, allowed, 0.0).nonzero().flatten()
    return found


@pytest.fixture(scope="module")
def counts(sampler) -> torch.Tensor:
    """P(c), c = 0..3: every text of two tokens, with the exact mass of the third."""
    texts = torch.tensor(sampler.base.tokenizer(PROMPT)["input_ids"])[None]
    chance, hits, set_ = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long), sampler.mask
    for _ in range(LENGTH - 1):
        chances = chance[:, None] * _next(sampler, texts)
        rows, ids = (chances > 0).nonzero(as_tuple=True)
        texts, chance, hits = torch.cat([texts[rows], ids[:, None]], 1), chances[rows, ids], hits[rows] + set_[ids]
    mass, found = _next(sampler, texts)[:, set_].sum(1), torch.zeros(LENGTH + 1, dtype=torch.float64)
    found.index_add_(0, hits + 1, chance * mass).index_add_(0, hits, chance * (1 - mass))
    assert float(found.sum()) == pytest.approx(1.0)
    return found


@torch.no_grad()
def _next(sampler: Sampler, texts: torch.Tensor) -> torch.Tensor:
    z = sampler.base.model(texts).logits[:, -1].double()
    return z.index_fill(1, sampler.never, float("-inf")).softmax(1)


def test_log_z_lies_between_what_particles_give_without_and_with_a_text_of_the_target(sampler, counts, monkeypatch):
    chosen, choose = [], Texts.choose
    monkeypatch.setattr(Texts, "choose", lambda texts, rows: (chosen.append(rows), choose(texts, rows)))
    monkeypatch.setattr(bound, "RESAMPLED", 0.8)
    f = Potential(5.0, 0.6, 1.5)
    exact = float((counts * f(torch.arange(LENGTH + 1)).exp()).sum().log())
    assert abs(exact) > 0.1  # something to estimate
    runs = [sampler.run(PROMPT, f, 4, seed) for seed in range(200)]
    z = [math.exp(run.log_z - exact) for run in runs]
    error = stdev(z) / math.sqrt(len(z))
    assert error > 0  # no estimate is exact by chance
    assert mean(z) == pytest.approx(1.0, abs=4 * error)
    many = [sampler.run(PROMPT, f, 64, 500 + seed) for seed in range(10)]  # their texts are as good as the target's
    drawn = [run.ids[i] for run in many for i in torch.multinomial(run.weights, 20, replacement=True)]
    above = [sampler.run(PROMPT, f, 4, 1000 + seed, ids).log_z for seed, ids in enumerate(drawn)]
    assert mean(run.log_z for run in runs) < exact < mean(above)
    assert chosen  # particles were chosen again, which the weights have to make up for


def test_without_a_potential_every_weight_is_one_and_texts_are_the_models(sampler, counts):
    run = sampler.run(PROMPT, Potential(0.0, 0.0, 1.0), 4000, 0)
    assert run.log_z == pytest.approx(0.0, abs=1e-6)
    assert sampler.counts(run) == pytest.approx(counts, abs=4 * 0.5 / math.sqrt(4000))


def test_a_logit_bias_has_the_kl_of_its_definition(sampler):
    """KL(q || p) = lambda m - log Z, against sums over the vocabulary."""
    masses, kl, hits = sampler.tilted(PROMPT, Potential(2.0, 0.0, 0.0), 64, 0)
    start = sampler.base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        z = sampler.base.model(start).logits[0, -1].double().index_fill(0, sampler.never, float("-inf"))
    p, q = z.softmax(0), (z + 2.0 * sampler.mask).softmax(0)
    assert float(masses[0, 0]) == pytest.approx(float(q[sampler.mask].sum()), rel=1e-5)
    assert float(kl[0, 0]) == pytest.approx(float(torch.xlogy(q, q / p.clamp(min=1e-300)).sum()), rel=1e-4)
    assert 0 < hits.sum() < hits.numel() * LENGTH


def test_the_dual_finds_the_policy_with_the_wanted_moments(counts):
    """From exact counts: the best policy has the mean and the variance that were asked for, and the bound is its KL."""
    rate, variance = 0.6, 0.3
    f = Potential(1.0, 0.5, rate * LENGTH)
    at = torch.arange(LENGTH + 1, dtype=torch.float64)
    for _ in range(60):
        z = (counts * f(at).exp()).sum()
        f = dual((counts * f(at).exp() / z)[None], z.log()[None], f, variance)
    best = counts * f(at).exp()
    best /= best.sum()
    assert float(best @ at) == pytest.approx(f.centre, abs=1e-3)
    assert float(best @ (at - f.centre) ** 2) == pytest.approx(variance, abs=1e-3)
    least = f.strength * f.centre - f.evenness * variance / 2 - float((counts * f(at).exp()).sum().log())
    assert least == pytest.approx(float((best * (best / counts).log()).sum()), abs=1e-3)
