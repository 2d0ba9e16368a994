"""Samples after the prompts of several families, and what fitting a head to them needs: states, masses, the tilt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..objective.head_fit import Contexts
from ..objective.kl import chunk_positions
from ..objective.tilt import Atoms
from ..options import SamplingOptions
from ..tokens.ends import special_ids
from .position_scores import SCORE_BYTES
from .sampler import Samples, sample

STATES = 20_000
"""Most states that are kept, over all families: a fit needs no more, and those of a wide model take 8 KiB each."""


@dataclass(frozen=True)
class FamilySamples:
    """Texts after the prompts of every family, by the model as it is or under an exact logit bias.

    Attributes:
        members: F, membership in every set, float32 (K, V).
        prompts: ids of every family's prompts, by its name.
        decoding: temperature, top-k, top-p and the length of a text; rates are those of texts decoded like this.
    """

    base: Base
    split_model: SplitModel
    members: torch.Tensor
    prompts: dict[str, list[list[int]]]
    decoding: SamplingOptions

    @property
    def names(self) -> list[str]:
        return list(self.prompts)

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    def rates(self, texts: int, seed: int, tilts: torch.Tensor | None = None) -> torch.Tensor:
        """Expected rates of `texts` texts of every family, (F, texts, K) float64.

        By the model as it is, or under an exact logit bias lambda_f (F, K) for each family.
        """
        rates = torch.zeros(len(self.prompts) * texts, len(self.members), dtype=torch.float64)
        for batch in self._drawn(texts, seed, tilts):
            assert batch.masses is not None  # members are given
            rates[batch.rows] = batch.masses.double().mean(1)
        return rates.view(len(self.prompts), texts, -1)

    def contexts(self, texts: int, seed: int, tilts: torch.Tensor) -> tuple[list[Contexts], torch.Tensor]:
        """Positions of texts by the base tilted by lambda_f (F, K), and the expected rates (F, K) there, float64.

        Tilts are in units of the decoded logits, which are divided by the temperature: there a bias is lambda / T. The
        masses in the contexts are those before top-k and top-p cut any, so that another tilt can be weighed in them.
        """
        families, length = len(self.prompts), self.decoding.max_new_tokens
        step = max(1, texts * length * families // STATES)
        states, width = {}, self.split_model.weight.shape[1]
        rates = torch.zeros(families * texts, len(self.members), dtype=torch.float64)
        for batch in self._drawn(texts, seed, tilts * self.decoding.temperature):
            assert batch.masses is not None  # members are given
            rates[batch.rows] = batch.masses.double().mean(1)
            for row, text in zip(batch.rows.tolist(), batch.states, strict=True):
                states[row] = text[row % step :: step].clone()
        found = []
        for family, tilt in enumerate(tilts.float()):
            kept = torch.cat([states.pop(family * texts + i) for i in range(texts)]).view(-1, width)
            found.append(Contexts(kept.bfloat16().cpu(), self._masses(kept), tilt.expand(len(kept), -1)))
        return found, rates.view(families, texts, -1).mean(1)

    @torch.no_grad()
    def _masses(self, states: torch.Tensor) -> torch.Tensor:
        """The base's masses of the atoms at states (M, D) at the decoding's temperature, (M, P) float32."""
        base, atoms = SplitModel(self.split_model.model), self.atoms
        found = torch.empty(len(states), len(atoms.patterns))  # made first: small results between chunks pin the heap
        for rows in torch.arange(len(states)).split(chunk_positions(len(base.weight), SCORE_BYTES)):
            logits = base.logits(states[rows]).float().div_(self.decoding.temperature)
            found[rows] = atoms.masses(logits.log_softmax(-1)).float().clamp(min=1e-30).cpu()
        return found

    def _drawn(self, texts: int, seed: int, tilts: torch.Tensor | None) -> Iterator[Samples]:
        """Batches of `texts` texts of each family, in order; every prompt of a family as often as its others."""
        banned = sorted(special_ids(self.base.tokenizer, self.base.model))
        rows = [row for prompts in self.prompts.values() for row in in_turn(prompts, texts, seed)]
        each = None if tilts is None else tilts.to(self.members).repeat_interleave(texts, dim=0)
        decoding = replace(self.decoding, seed=seed)
        return sample(SplitModel(self.split_model.model), rows, decoding, banned, self.members, each)


def in_turn(prompts: list[list[int]], texts: int, seed: int) -> list[list[int]]:
    """A prompt for each of `texts` texts: all in turn, in another order for every seed."""
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randperm(len(prompts), generator=generator) for _ in range(-(-texts // len(prompts)))]
    return [prompts[i] for i in torch.cat(turns)[:texts].tolist()]
