"""Samples of the adapted model itself, and the exact set masses along them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from ..objective.tilt import Atoms
from ..tokens.token_bytes import special_ids
from .contexts import openings, tokens_left
from .generation import sample_after

TEXTS, LENGTH = 256, 64
"""How many texts measure a rate, and how many tokens of each are the model's own."""


@torch.no_grad()
def log_probabilities(policy: SplitModel, hidden: torch.Tensor, banned: torch.Tensor | None = None) -> torch.Tensor:
    """log softmax of a chunk of states, (n, D) -> (n, V) float32; banned ids get no probability."""
    z = policy.logits(hidden).float()
    if banned is not None and len(banned):
        z[:, banned] = float("-inf")
    return z.log_softmax(-1)


@torch.no_grad()
def atom_masses(
    policy: SplitModel, ids: torch.Tensor, start: int, atoms: Atoms, banned: torch.Tensor | None = None
) -> torch.Tensor:
    """Masses of the atoms at the positions that predict ids[:, start:], ((T - start) * N, P) float64.

    Their mean over the model's own samples is the rate with the sampling noise of each token averaged out exactly
    (Rao and Blackwell): E[1[x in S] | context] in place of 1[x in S].
    """
    parts = []
    step = chunk_positions(policy.weight.shape[0])
    for rows in ids.split(64):
        hidden = policy.hidden(rows.to(policy.weight.device))[:, start - 1 : -1].flatten(0, 1)
        parts += [
            atoms.masses(log_probabilities(policy, h, banned)).cpu() for h in hidden.split(step)
        ]  # fmt: skip
    return torch.cat(parts)


@dataclass(frozen=True)
class OwnSamples:
    """Openings of the base, continued by the model as it is; the rates of K sets along the continuations.

    Attributes:
        openings: (N, P) ids, drawn from the base when the object is made: adapters must be off then.
        members: F, membership in every set, float32 (K, V).
    """

    base: Base
    split_model: SplitModel
    members: torch.Tensor
    seed: int
    openings: torch.Tensor = field(init=False)
    banned: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "openings", openings(self.base, 512, seed=self.seed))
        object.__setattr__(self, "banned", sorted(special_ids(self.base.tokenizer)))

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    @property
    def length(self) -> int:
        """Tokens of a continuation: `LENGTH`, or what the model's context leaves."""
        return min(LENGTH, tokens_left(self.base, self.openings.shape[1]))

    def draw(self, seed: int, count: int, tilt: torch.Tensor | None = None) -> torch.Tensor:
        """`count` texts, (count, P + length); `tilt` (V,) is added to the logits."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.openings[torch.randperm(len(self.openings), generator=generator)[:count]]
        return sample_after(self.split_model.model, rows, self.length, seed=seed, banned=self.banned, tilt=tilt)

    def rates(self, tilt: torch.Tensor | None = None, count: int | None = None, index: int = 0) -> torch.Tensor:
        """Sampled rates (K,) float64; the same texts come again for the same index."""
        policy = SplitModel(self.split_model.model, tilt)
        ids = self.draw(7919 * (self.seed + 1) + index, count or TEXTS, tilt)
        banned = torch.tensor(self.banned, device=self.split_model.weight.device)
        masses = atom_masses(policy, ids, self.openings.shape[1], self.atoms, banned)
        return (masses @ self.atoms.patterns).mean(0)
