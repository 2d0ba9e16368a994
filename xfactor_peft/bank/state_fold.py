"""Fold a constant bias of the logits into an output embedding behind an RMSNorm, as nearly as the model's states allow.

Nothing is constant in an RMSNorm's output by design, but in a trained model some direction nearly is. On states h of
the adapted model's own texts, after the bundled families of prompts, u is the least-squares solution of u h = 1,
weighted by how much the masses m on the sets move with their logits:

    u = (E[v h h^T])^-1 E[v h],    v = sum_k b_k^2 m_k (1 - m_k),      W_i' = W_i + b_i u.

What is lost, b (u h - 1) on the logits of the sets, is known in every context, and so are R and KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base.loading import Base
from ..base.split_model import split
from ..errors import XFactorError
from ..objective.head_fit import Contexts
from ..objective.tilt import Atoms
from ..options import SamplingOptions
from ..sampling.contexts import tokens_left
from ..sampling.family_samples import FamilySamples
from ..sampling.prompt_families import FIT, bundled, encode

TEXTS, LENGTH, RIDGE = 16, 64, 1e-6
MOST_MISSED = 0.05
"""Of the rate; above it there is no export."""


@dataclass(frozen=True)
class StateFold:
    """How a bias is folded.

    Attributes:
        direction: u, (D,).
        residual: root mean square of u h - 1, weighted by v.
        rates, rates_after: expected rates (K,) of the adapter and with u h in place of 1, in the adapter's contexts.
        kl: KL(after || adapter) there, nats per token.
    """

    direction: torch.Tensor
    residual: float
    rates: torch.Tensor
    rates_after: torch.Tensor
    kl: float

    def describe(self) -> str:
        """In words, for people."""
        pairs = ", ".join(f"{r:.4f} → {s:.4f}" for r, s in zip(self.rates, self.rates_after, strict=True))
        return f"offset folded with a residual of {self.residual:.1%}: R {pairs}, KL {self.kl:.1e} nats/token"


def fold_by_states(base: Base, bias: torch.Tensor) -> StateFold:
    """u for a `bias` (V,), which the active adapter of `base` adds to its logits.

    Raises:
        XFactorError: a rate would be missed by more than `MOST_MISSED` of it.
    """
    values = bias.unique()
    values = values[values != 0]
    members = (bias == values[:, None]).float()
    length = min(LENGTH, tokens_left(base, 1) // 2)
    prompts = encode(base, bundled(FIT), length)
    samples = FamilySamples(base, split(base.model), members, prompts, SamplingOptions(length))
    contexts, _ = samples.contexts(TEXTS, 11)
    fold = _solved(contexts, samples.atoms, values.double().cpu())
    missed = (fold.rates_after - fold.rates).abs()
    if (missed > MOST_MISSED * fold.rates + 1e-4).any():
        raise XFactorError(
            f"{type(base.model).__name__} has no bias in its output embedding and no LayerNorm before it, and no "
            f"direction of its states is constant enough for the set head's offset ({fold.describe()}); keep the "
            "adapter, export a logit bias, or train with `same_rate=everywhere`, whose head needs no offset here"
        )
    return fold


def _solved(families: Sequence[Contexts], atoms: Atoms, values: torch.Tensor) -> StateFold:
    h = torch.cat([family.states.flatten(0, 1) for family in families]).double()
    m = torch.cat([family.masses.flatten(0, 1) for family in families]).double()
    mass = m @ atoms.patterns
    v = (mass * (1 - mass)) @ values.square()
    gram = (v[:, None] * h).T @ h
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    u = torch.linalg.solve(gram, h.T @ v)
    off = h @ u - 1
    after = (m.log() + (off[:, None] * values) @ atoms.patterns.T).softmax(1)
    return StateFold(
        direction=u,
        residual=float(((v * off.square()).sum() / v.sum()).sqrt()),
        rates=mass.mean(0),
        rates_after=(after @ atoms.patterns).mean(0),
        kl=float(torch.special.xlogy(after, after / m).sum(1).mean()),
    )
