"""Samples after the prompts of several families, and what fitting a head to them needs: states and masses in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
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

STATES, ROUNDS = 8_000, 4
"""About how many states are kept of a round over all families, at least one of each piece, and rounds: those of a wide
model take 8 KiB each."""
PIECE = 32
"""Tokens of a text in which a head holds its rate."""


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

    def masses(self, texts: int, seed: int) -> torch.Tensor:
        """Masses of the sets along `texts` texts of every family by the model as it is, (F texts, length, K)."""
        found = torch.zeros(len(self.prompts) * texts, self.decoding.max_new_tokens, len(self.members))
        for batch in self._drawn(texts, seed):
            assert batch.masses is not None  # members are given
            found[batch.rows] = batch.masses
        return found

    def rates(self, texts: int, seed: int) -> torch.Tensor:
        """Expected rates of `texts` texts of every family, (F, texts, K) float64."""
        return self.masses(texts, seed).double().mean(1).view(len(self.prompts), texts, -1)

    def contexts(
        self, texts: int, seed: int, base_only: Callable[[], AbstractContextManager] = nullcontext
    ) -> tuple[list[Contexts], torch.Tensor]:
        """Positions of texts by the model as it is, and the expected rates (F, texts, K) of these texts, float64.

        The masses in the contexts are those of the model inside `base_only()`, before top-k and top-p cut any, so that
        a tilt can be weighed in them. Tilts are in units of the decoded logits: there a bias is lambda / T.
        """
        families, length = len(self.prompts), self.decoding.max_new_tokens
        piece = min(PIECE, length)
        step = min(piece, max(1, texts * length * families // STATES))
        states: dict[int, torch.Tensor] = {}
        rates = torch.zeros(families * texts, len(self.members), dtype=torch.float64)
        for batch in self._drawn(texts, seed):
            assert batch.masses is not None  # members are given
            rates[batch.rows] = batch.masses.double().mean(1)
            for row, text in zip(batch.rows.tolist(), batch.states, strict=True):
                pieces = text[: length // piece * piece].view(-1, piece, text.shape[1])
                states[row] = pieces[:, row % step :: step][:, : piece // step].clone()
        found = []
        with base_only():
            for family in range(families):
                kept = torch.cat([states.pop(family * texts + i) for i in range(texts)])
                masses = self._masses(kept.flatten(0, 1)).view(*kept.shape[:2], -1)
                found.append(Contexts(kept.bfloat16().cpu(), masses))
        return found, rates.view(families, texts, -1)

    @torch.no_grad()
    def _masses(self, states: torch.Tensor) -> torch.Tensor:
        """The model's masses of the atoms at states (M, D) at the decoding's temperature, (M, P) float32."""
        base, atoms = SplitModel(self.split_model.model), self.atoms
        found = torch.empty(len(states), len(atoms.patterns))  # made first: small results between chunks pin the heap
        for rows in torch.arange(len(states)).split(chunk_positions(len(base.weight), SCORE_BYTES)):
            logits = base.logits(states[rows]).float().div_(self.decoding.temperature)
            found[rows] = atoms.masses(logits.log_softmax(-1)).float().clamp(min=1e-30).cpu()
        return found

    def _drawn(self, texts: int, seed: int) -> Iterator[Samples]:
        """Batches of `texts` texts of each family, in order; every prompt of a family as often as its others."""
        banned = special_ids(self.base.tokenizer, self.base.model)
        rows = [row for prompts in self.prompts.values() for row in in_turn(prompts, texts, seed)]
        decoding = replace(self.decoding, seed=seed)
        return sample(SplitModel(self.split_model.model), rows, decoding, banned, self.members)


def in_turn(prompts: list[list[int]], texts: int, seed: int) -> list[list[int]]:
    """A prompt for each of `texts` texts: all in turn, in another order for every seed."""
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randperm(len(prompts), generator=generator) for _ in range(-(-texts // len(prompts)))]
    return [prompts[i] for i in torch.cat(turns)[:texts].tolist()]
