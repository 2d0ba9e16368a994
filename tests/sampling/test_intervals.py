"""Intervals cover what they promise, by simulation; and what a reader is warned of."""

from types import SimpleNamespace

import pytest
import torch

from xfactor_peft.sampling.intervals import mean_interval, rate_interval
from xfactor_peft.sampling.warnings import rate_warnings

LENGTH = 64
RATES = (0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999)
CORRELATIONS = (0.0, 0.02, 0.05, 0.2)
"""Of two tokens of one text; samples of language models have about 0.05."""


def drawn(rate, correlation, texts, generator_seed):
    """Counts (texts,) of set tokens, beta-binomial by its definition: every text has a rate of its own."""
    torch.manual_seed(generator_seed)
    own = torch.full((texts,), rate, dtype=torch.float64)
    if correlation:
        strength = 1 / correlation - 1
        own = torch.distributions.Beta(own * strength, (1 - own) * strength).sample().clamp(1e-300, 1)
    return torch.binomial(torch.full((texts,), float(LENGTH), dtype=torch.float64), own)


def covered(interval, texts, trials=12):
    """Share of trials in which `interval` holds the rate; rates around RATES, since counts come in whole numbers."""
    hits = []
    for rate in RATES:
        for trial in range(trials):
            odds = rate / (1 - rate) * 2 ** (trial / (trials - 1) - 0.5)
            true = odds / (1 + odds)
            for correlation in CORRELATIONS:
                low, high = interval(drawn(true, correlation, texts, len(hits)), LENGTH)
                hits.append(low <= true <= high)
    return sum(hits) / len(hits)


def percentile_bootstrap(counts, length):
    return mean_interval((counts / length).unsqueeze(1).expand(-1, length), resamples=200)


@pytest.mark.parametrize("texts", [4, 16, 256])
def test_a_rates_interval_covers_95_percent(texts):
    assert 0.93 <= covered(rate_interval, texts) <= 0.975


def test_one_text_says_little_and_a_bootstrap_says_too_much():
    assert covered(rate_interval, 1) >= 0.93
    assert covered(percentile_bootstrap, 4) < 0.8  # the check can fail


def test_ends_and_symmetry():
    for texts in (1, 5, 200):
        low, high = rate_interval(torch.zeros(texts), LENGTH)
        assert low == 0
        assert 0 < high < 1
        assert rate_interval(torch.full((texts,), LENGTH), LENGTH) == (pytest.approx(1 - high, abs=1e-6), 1.0)
    low, high = rate_interval(torch.tensor([3]), LENGTH)
    assert low < 3 / LENGTH < high
    assert rate_interval(torch.zeros(200), LENGTH)[1] < 0.005


def test_many_texts_give_the_normal_interval():
    counts = drawn(0.2, 0.05, 4000, 0)
    low, high = rate_interval(counts, LENGTH)
    share = counts / LENGTH
    error = 1.96 * float(share.std()) / 4000**0.5
    assert (low, high) == (
        pytest.approx(float(share.mean()) - error, abs=3e-4),
        pytest.approx(float(share.mean()) + error, abs=3e-4),
    )


def test_texts_alike_or_not_change_the_width():
    even, uneven = torch.tensor([6, 7, 6, 7] * 8), torch.tensor([0, 13, 0, 13] * 8)
    widths = [high - low for low, high in (rate_interval(counts, LENGTH) for counts in (even, uneven))]
    assert widths[1] > 2 * widths[0]


def test_a_means_interval_covers_and_shrinks():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        low, high = mean_interval(torch.rand(50, 1, generator=generator), seed=trial)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99
    small, large = (mean_interval(torch.rand(n, 1, generator=generator)) for n in (20, 2000))
    assert large[1] - large[0] < (small[1] - small[0]) / 4
    assert mean_interval(torch.ones(5, 3)) == (1.0, 1.0)
    low, high = mean_interval(torch.rand(1, 64, generator=generator))
    assert low < high  # one text is cut into pieces


def scores(rate, interval, spread):
    return SimpleNamespace(goals=(), rate=rate, interval=interval, spread=spread)


def test_a_missed_rate_is_said_and_a_met_one_is_not():
    assert rate_warnings([0.1], scores(0.096, (0.085, 0.108), 0.08)) == []
    (missed,) = rate_warnings([0.1], scores(0.072, (0.062, 0.083), 0.07))
    assert all(part in missed for part in ("0.0720", "wanted 0.1", "prompts"))


def test_texts_that_are_all_or_nothing_are_called_that():
    counts = torch.tensor([0.0, 0, 0, 62])
    rate, spread = float(counts.mean() / LENGTH), float((counts / LENGTH).std())
    (extremes,) = rate_warnings([0.25], scores(rate, rate_interval(counts, LENGTH), spread))
    assert "extremes" in extremes
