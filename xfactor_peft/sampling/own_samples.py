"""Samples of the adapted model itself, and the exact set masses along them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from ..objective.tilt import Atoms
from ..options import RateOptions
from ..progress import phase
from ..tokens.ends import special_ids
from .contexts import openings, tokens_left
from .family_samples import FamilySamples, in_turn
from .position_scores import SCORE_BYTES
from .prompt_families import fitting_prompts
from .sampler import continued, sample

TEXTS, LENGTH, OPENINGS = 256, 64, 256
"""How many texts measure a rate, how many tokens of each are the model's own, and how many beginnings there are."""
LONG = 128
"""Tokens of a text that a head is fitted to: what has been said changes the rate of what follows."""
ROWS_AT_ONCE = 256
"""Positions that go through the trunk together."""


@torch.no_grad()
def atom_masses(policy: SplitModel, ids: torch.Tensor, atoms: Atoms) -> torch.Tensor:
    """Masses of the atoms at the positions that predict ids[:, 1:]; (N, T) ids -> ((T - 1) N, P) float64."""
    parts, step = [], chunk_positions(len(policy.weight), SCORE_BYTES)
    for rows in ids.split(max(1, ROWS_AT_ONCE // ids.shape[1])):
        hidden = policy.hidden(rows.to(policy.weight.device))[:, :-1].flatten(0, 1)
        parts += [atoms.masses(policy.logits(h).float().log_softmax(-1)).cpu() for h in hidden.split(step)]
    return torch.cat(parts)


@dataclass
class OwnSamples:
    """Prompts of several families, continued by the model as it is; the rates of K sets along the continuations.

    Attributes:
        rate: the decoding that rates are measured under, and a file of prompts.
        openings: (N, P) ids, drawn from the base when the object is made: adapters must be off then.
        prompts: ids of every family's prompts, by its name.
        members: F, membership in every set, float32 (K, V).
    """

    base: Base
    split_model: SplitModel
    members: torch.Tensor
    seed: int
    rate: RateOptions
    openings: torch.Tensor = field(init=False)
    prompts: dict[str, list[list[int]]] = field(init=False)
    banned: set[int] = field(init=False)

    def __post_init__(self) -> None:
        with phase("drawing openings"):
            self.openings = openings(self.base, OPENINGS, seed=self.seed)
        self.prompts = fitting_prompts(self.base, self.openings, self.rate.prompts, self.length)
        self.banned = special_ids(self.base.tokenizer, self.base.model)

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    @property
    def length(self) -> int:
        """Tokens of a continuation: `LENGTH`, or what the model's context leaves."""
        return min(LENGTH, tokens_left(self.base, self.openings.shape[1]))

    def draw(self, seed: int, count: int) -> torch.Tensor:
        """`count` texts after openings, (count, P + length), at temperature 1."""
        generator = torch.Generator().manual_seed(seed)
        starts = self.openings[torch.randperm(len(self.openings), generator=generator)[:count]]
        return continued(self.split_model, starts, self.length, seed=seed, banned=self.banned)

    @property
    def families(self) -> FamilySamples:
        """The same prompts family by family; texts are `LONG` where the model's context leaves as much."""
        longest = max(len(row) for rows in self.prompts.values() for row in rows)
        decoding = self.rate.decoding(min(LONG, tokens_left(self.base, longest)))
        return FamilySamples(self.base, self.split_model, self.members, self.prompts, decoding)

    def rates(self, index: int = 0) -> torch.Tensor:
        """Sampled rates (K,) of the model as it is, float64."""
        masses, _ = self.texts(None, TEXTS, index)
        return masses.double().mean((0, 1)) @ self.atoms.patterns

    def texts(self, strengths: torch.Tensor | None, count: int, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts, about `count`, as many a family, of the model tilted by lambda (K,), or as it is: masses of the atoms
        along them, (N, length, P), and the atom of every token, (N, length).

        The same texts come again for the same index.
        """
        seed, atoms = 7919 * (self.seed + 1) + index, self.atoms
        tilt = None if strengths is None else strengths.to(self.members) @ self.members
        policy, options = SplitModel(self.split_model.model, tilt), self.rate.decoding(self.length, seed)
        indicators = F.one_hot(atoms.of_token, len(atoms.patterns)).T.to(self.members)
        each, masses, drawn = -(-count // len(self.prompts)), [], []
        prompts = [row for rows in self.prompts.values() for row in in_turn(rows, each, seed)]
        for batch in sample(policy, prompts, options, self.banned, indicators):
            assert batch.masses is not None  # sets are given
            masses.append(batch.masses)
            drawn.append(atoms.of_token[batch.continuations])
        return torch.cat(masses), torch.cat(drawn)
