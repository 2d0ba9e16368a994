"""Samples after the prompts of several families, with what fitting a head to them needs: states, masses, what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..objective.head_fit import FamilyTexts
from ..objective.tilt import Atoms
from ..options import SamplingOptions
from ..tokens.ends import special_ids
from .sampler import sample

STATE_BYTES = 64 * 2**20
"""Most that the stored states of all families and rounds take."""
LEAST_MASS = 1e-12
"""A mass that decoding cuts to 0 counts as this: a tilt of any size in use leaves it at nothing."""

Tilt = Callable[[torch.Tensor], torch.Tensor]
"""(N, L, D) states -> (N, L, K), the tilt under which texts were drawn."""


@dataclass(frozen=True)
class FamilySamples:
    """Texts after the prompts of every family, by the model as it is or under an exact logit bias.

    Attributes:
        members: F, membership in every set, float32 (K, V).
        prompts: ids of every family's prompts, by its name.
        decoding: temperature, top-k and top-p of the text, and its length.
    """

    base: Base
    split_model: SplitModel
    members: torch.Tensor
    prompts: dict[str, list[list[int]]]
    decoding: SamplingOptions

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    def draw(self, name: str, count: int, seed: int, *, bias: torch.Tensor | None, tilt: Tilt) -> FamilyTexts:
        """`count` texts of a family, its prompts in turn.

        Args:
            bias: lambda (K,), added to the logits of the sets; None for the model as it is.
            tilt: what the sets' logits were raised by over the base's, by the bias or by an adapter's head.
        """
        atoms, device = self.atoms, self.split_model.weight.device
        raised = None if bias is None else bias.to(self.members) @ self.members
        policy = SplitModel(self.split_model.model, raised)
        indicators = torch.nn.functional.one_hot(atoms.of_token).T.float().to(device)
        banned = sorted(special_ids(self.base.tokenizer, self.base.model))
        rows = [self.prompts[name][i % len(self.prompts[name])] for i in _order(len(self.prompts[name]), count, seed)]
        parts = []
        for batch in sample(policy, rows, replace(self.decoding, seed=seed), banned, indicators):
            assert batch.masses is not None  # indicators are given
            tilts = tilt(batch.states.float().cpu())
            patterns = atoms.patterns.float()
            tempered = tilts / (self.decoding.temperature or 1)
            log_atoms = (batch.masses.clamp(min=LEAST_MASS).log() - tempered @ patterns.T).log_softmax(-1)
            drawn = atoms.of_token[batch.continuations]
            parts.append(FamilyTexts(batch.states.bfloat16().cpu(), log_atoms, drawn, tempered))
        return FamilyTexts(*(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS))


_FIELDS = ("states", "log_atoms", "drawn", "tilt")


def _order(prompts: int, count: int, seed: int) -> Sequence[int]:
    """Which prompt each text begins with: all of them equally often, in another order for every seed."""
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randperm(prompts, generator=generator) for _ in range(-(-count // prompts))]
    return torch.cat(turns)[:count].tolist()


def texts_that_fit(families: int, width: int, length: int, wanted: int) -> int:
    """How many texts a family, at most `wanted`, have their states stored in `STATE_BYTES`; at least 8."""
    return min(wanted, max(8, STATE_BYTES // (families * length * width * 2)))
