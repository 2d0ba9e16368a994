"""95 % intervals of a rate and of a mean over sampled texts, right also for few texts and at 0 and 1."""

from __future__ import annotations

import math

import torch

GRID, CORRELATIONS = 160, 24
ALIKE = 0.01
"""Correlation of two tokens of one text below which the prior no longer prefers smaller ones."""
PIECES = 8


def rate_interval(counts: torch.Tensor, length: int) -> tuple[float, float]:
    """95 % credible interval of R from `counts` (N,) of set tokens in N texts of `length` tokens each.

    Tokens of one text are alike, so N texts say less than N·length tokens: counts are beta-binomial,
    k ~ BetaBin(length, μ, ρ), with mean μ and correlation ρ between two tokens of a text (a design effect of
    1 + (length - 1)ρ). The interval is the central 95 % of μ's posterior under Jeffreys' prior Beta(1/2, 1/2), with ρ
    integrated out under a prior ∝ 1/(ρ + ALIKE). Its end is 0 where no token is in the set, and 1 where every token
    is (Brown, Cai and DasGupta 2001, section 4.1.2).

    A percentile bootstrap, in comparison, is [0, 0] for texts without a set token and a single point for one text.
    """
    values, number = counts.long().cpu().unique(return_counts=True)
    angle, root = (0.0, math.pi / 2), (0.0, 1.0)  # where μ = sin² angle and ρ = root³ may be
    for _ in range(3):  # each time on a grid of what the one before found possible
        angles = torch.linspace(*angle, GRID, dtype=torch.float64)
        edges = torch.linspace(*root, CORRELATIONS + 1, dtype=torch.float64)
        posterior = _posterior(angles, edges**3, values, number, length)
        angle, root = _possible(angles, posterior.sum(1), 1), _possible(edges, posterior.sum(0), 2)
    density = posterior.sum(1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), ((density[1:] + density[:-1]) / 2).cumsum(0)])
    ends = [_quantile(angles, mass, share) for share in (0.025, 0.975)]
    return 0.0 if int(values.max()) == 0 else ends[0], 1.0 if int(values.min()) == length else ends[1]


def _possible(grid: torch.Tensor, density: torch.Tensor, above: int) -> tuple[float, float]:
    found = (density > 1e-7 * density.max()).nonzero().flatten()
    return float(grid[max(0, int(found[0]) - 1)]), float(grid[min(len(grid) - 1, int(found[-1]) + above)])


def _posterior(
    angles: torch.Tensor, edges: torch.Tensor, values: torch.Tensor, number: torch.Tensor, length: int
) -> torch.Tensor:
    """(A, C) up to a factor: density at μ = sin² of `angles` (A,), in which Jeffreys' prior is flat, by cells of ρ."""
    correlation = (edges[:-1] + edges[1:]) / 2
    prior = (edges + ALIKE).log().diff().log()
    mean = angles.sin().square().clamp(1e-15, 1 - 1e-15).unsqueeze(1)
    a, b = mean * (1 / correlation - 1), (1 - mean) * (1 / correlation - 1)
    hit = values.double().view(-1, 1, 1)
    likelihood = torch.lgamma(a + hit) + torch.lgamma(b + (length - hit)) - torch.lgamma(a + b + length)
    likelihood += torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    log_density = prior + (number.view(-1, 1, 1) * likelihood).sum(0)
    return (log_density - log_density.max()).exp()


def _quantile(angles: torch.Tensor, mass: torch.Tensor, share: float) -> float:
    """μ below which `share` of the posterior lies, linear between the points of the grid."""
    wanted = mass[-1] * share
    above = min(max(1, int(torch.searchsorted(mass, wanted))), len(mass) - 1)
    step = (wanted - mass[above - 1]) / (mass[above] - mass[above - 1]).clamp_min(1e-300)
    return float((angles[above - 1] + step * (angles[above] - angles[above - 1])).sin().square())


def mean_interval(values: torch.Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N, L), one a position, resampling whole texts (Efron 1979).

    Fewer than PIECES texts are cut into pieces until there are as many: what one text says about others is little, and
    the interval is then about this text.
    """
    rows = values.double().cpu()
    cuts = min(rows.shape[1], math.ceil(PIECES / len(rows)))
    means = torch.cat([piece.mean(1) for piece in rows.tensor_split(cuts, dim=1)])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(means), (resamples, len(means)), generator=generator)
    low, high = torch.quantile(means[picks].mean(1), torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
