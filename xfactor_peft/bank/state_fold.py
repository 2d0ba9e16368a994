"""Fold a constant bias of the logits into an output embedding behind an RMSNorm, as nearly as the model's states allow.

Nothing is constant in an RMSNorm's output by design, but in a trained model some direction nearly is. On states h of
the adapted model's own texts, after the bundled families of prompts, u is the least-squares solution of u h = 1,
weighted by how much the masses m on the sets move with their logits:

    u = (E[v h h^T])^-1 E[v h],    v = sum_k b_k^2 m_k (1 - m_k),      W_i' = W_i + b_i u.

The tokens of one offset are a set. A head for phrases has as many offsets as tokens: then a token is a set of its own,
m its probability, and nothing of size K x V is made.

What is lost, b (u h - 1) on the logits of the sets, is known in every context, and so are R and KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..base.loading import Base
from ..base.split_model import SplitModel, split
from ..errors import XFactorError
from ..objective.head_fit import Contexts
from ..objective.kl import chunk_positions
from ..objective.tilt import Atoms
from ..options import SamplingOptions
from ..phrases.ban import BAN
from ..sampling.contexts import tokens_left
from ..sampling.family_samples import FamilySamples
from ..sampling.position_scores import SCORE_BYTES
from ..sampling.prompt_families import FIT, bundled, encode

TEXTS, LENGTH, RIDGE = 16, 64, 1e-6
MOST_MISSED = 0.05
"""Of the rate; above it there is no export."""
MOST_SETS = 16
"""Distinct offsets whose tokens are sets; with more of them, every token is one."""


@dataclass(frozen=True)
class StateFold:
    """How a bias is folded.

    Attributes:
        direction: u, (D,).
        residual: root mean square of u h - 1, weighted by v.
        rates, rates_after: expected rates (K,) of the adapter and with u h in place of 1, in the adapter's contexts.
        kl: KL(after || adapter) there, nats per token.
        least: the smallest u h there.
        names: of the K rates; none where they are those of the offsets in order.
        bans: whether an offset is a ban, of which u h is left.
    """

    direction: torch.Tensor
    residual: float
    rates: torch.Tensor
    rates_after: torch.Tensor
    kl: float
    least: float
    names: tuple[str, ...] = ()
    bans: bool = False

    def describe(self) -> str:
        """In words, for people."""
        names = [f"{name} " for name in self.names] or [""] * len(self.rates)
        pairs = ", ".join(f"{n}{r:.4f} → {s:.4f}" for n, r, s in zip(names, self.rates, self.rates_after, strict=True))
        bans = f", bans of {BAN:g} are {BAN * self.least:+.0f} at the weakest" if self.bans else ""
        return f"offset folded with a residual of {self.residual:.1%}: R {pairs}, KL {self.kl:.1e} nats/token{bans}"


def fold_by_states(base: Base, bias: torch.Tensor) -> StateFold:
    """u for a `bias` (V,), which the active adapter of `base` adds to its logits.

    Raises:
        XFactorError: a rate would be missed by more than `MOST_MISSED` of it.
    """
    values = bias.unique()
    values = values[values != 0]
    groups = _groups(bias) if len(values) > MOST_SETS else {}
    members = torch.stack(list(groups.values())) if groups else bias == values[:, None]
    length = min(LENGTH, tokens_left(base, 1) // 2)
    prompts = encode(base, bundled(FIT), length)
    samples = FamilySamples(base, split(base.model), members.float(), prompts, SamplingOptions(length))
    contexts, _ = samples.contexts(TEXTS, 11)
    if groups:
        states = torch.cat([family.states.flatten(0, 1) for family in contexts])
        fold = _solved_by_token(samples.split_model, states, bias, samples.members)
    else:
        fold = _solved(contexts, samples.atoms, values.double().cpu())
    fold = replace(fold, names=tuple(groups), bans=bool(bias.min() <= BAN))
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
    u = _direction(h, v)
    off = h @ u - 1
    after = (m.log() + (off[:, None] * values) @ atoms.patterns.T).softmax(1)
    return StateFold(
        direction=u,
        residual=_residual(off, v),
        rates=mass.mean(0),
        rates_after=(after @ atoms.patterns).mean(0),
        kl=float(torch.special.xlogy(after, after / m).sum(1).mean()),
        least=1 + float(off.min()),
    )


def _groups(bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens whose rates are shown where every offset (V,) is another, by name."""
    groups = {"banned": bias <= BAN, "lowered": (bias > BAN) & (bias < 0), "raised": bias > 0}
    return {name: members for name, members in groups.items() if members.any()}


@torch.no_grad()
def _solved_by_token(policy: SplitModel, states: torch.Tensor, bias: torch.Tensor, members: torch.Tensor) -> StateFold:
    """With v = sum_i b_i^2 p_i (1 - p_i) of states (N, D), from logits in chunks; rates are those of `members`."""
    device, chunk = policy.weight.device, chunk_positions(len(bias), SCORE_BYTES)
    bias, members = bias.float().to(device), members.float().to(device)

    def log_probabilities(rows: torch.Tensor) -> torch.Tensor:
        return policy.logits(rows.to(device, policy.model.dtype)).float().log_softmax(-1)

    v = torch.cat([_moved(log_probabilities(rows), bias) for rows in states.split(chunk)])
    h = states.double()
    u = _direction(h, v)
    off = h @ u - 1
    totals = torch.zeros(3, len(members), dtype=torch.float64)
    for rows, far in zip(states.split(chunk), off.float().to(device).split(chunk), strict=True):
        before = log_probabilities(rows)
        after = (before + far[:, None] * bias).log_softmax(-1)
        kl = (after.exp() * (after - before)).sum().expand(len(members))
        totals += torch.stack([(before.exp() @ members.T).sum(0), (after.exp() @ members.T).sum(0), kl]).cpu()
    rates, rates_after, kl = totals / len(states)
    return StateFold(u, _residual(off, v), rates, rates_after, max(0.0, float(kl[0])), 1 + float(off.min()))


def _moved(log_probabilities: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """v (N,) of tokens by themselves, float64; above 0, so that it can weigh states that give them no mass."""
    p = log_probabilities.exp()
    return ((p * (1 - p)) @ bias.square()).double().clamp(min=1e-30).cpu()


def _direction(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """u (D,) for states (N, D) and their weights (N,)."""
    gram = (v[:, None] * h).T @ h
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, h.T @ v)


def _residual(off: torch.Tensor, v: torch.Tensor) -> float:
    return float(((v * off.square()).sum() / v.sum()).sqrt())
