"""LoRA in the last blocks: what no term on the output embedding can know.

Behind the last block "a sense" and "a kind" look alike, since both go on with " of"; a head that stops the one stops
the other. Inside the blocks the word itself is still there. So the MLPs of the last third learn, on texts of the base,

    mean over positions of KL(q || student),      q_i ~ p_i w(s, i),

at the positions where the student is not there yet, and at some of the others, where it is to stay the base. The head's
term of low rank stays as it is, its offset keeps learning; lower blocks are the base's, and need no backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..lora.wrap import adapter_off, add_lora, projections
from ..lowmem.linears import in_block
from ..objective.kl import chunk_positions
from ..options import LoraOptions, PhraseOptions
from ..progress import report
from .head import PhraseHead, Positions
from .texts import Texts
from .upper import UpperBlocks

SHARE = 3
"""One block in so many, the last ones, gets LoRA."""
BATCH, TEXTS = 8, 1
"""Texts of a step, and of them at once."""
WORTH_LEARNING = 1e-3
"""KL in nats above which a position is always learnt from; of the others one in four is."""


def last_blocks(model: PreTrainedModel, target: str = "mlp") -> list[str]:
    """Full names of the layers that `target` means in the last third of the blocks, at least one block.

    Raises:
        XFactorError: the model has none that LoRA can be on.
    """
    names = projections(model, target)
    blocks = sorted({_block(name) for name in names})
    kept = set(blocks[len(blocks) - max(1, len(blocks) // SHARE) :])
    return [name for name in names if _block(name) in kept]


def _block(name: str) -> int:
    return int(next(part for part in name.split(".") if part.isdigit()))


def wrap(base: Base, options: PhraseOptions, rank: int) -> PeftModel:
    """The base with LoRA on its output embedding and, unless `trunk_r` is 0, on its last blocks; all of it 0 so far."""
    if not options.trunk_r:
        return add_lora(base.model, LoraOptions(r=rank, alpha=rank, target="head"), sets=rank)
    lora = LoraOptions(r=options.trunk_r, alpha=2 * options.trunk_r, target="mlp,head")
    return add_lora(base.model, lora, sets=rank, only=last_blocks(base.model))


def upper_blocks(policy: SplitModel) -> UpperBlocks:
    """The blocks that have LoRA."""
    first = min(last_blocks(policy.model, "all"), key=_block).split(".")
    number = next(at for at, part in enumerate(first) if part.isdigit())
    return UpperBlocks(policy, ".".join(first[: number + 1]))


class Lesson:
    """Texts to learn from.

    Attributes:
        texts: whose `hidden` and `log_z` are the base's; ids: of prompt and text; entering: see `UpperBlocks`.
        at: the positions with what the teacher says there; rows: (N, L), numbers of `at`, -1 where a position waits
            for a word's end. Both by `taught`.
    """

    at: Positions
    rows: torch.Tensor

    def __init__(self, texts: Texts, upper: UpperBlocks) -> None:
        self.texts, self._upper = texts, upper
        self.ids = texts.whole(range(len(texts.ids)))
        parts = [self.ids[first : first + TEXTS] for first in range(0, len(self.ids), TEXTS)]
        self.entering = [states for part in parts for states in upper.entering(part)]

    def taught(self, at: Positions, kept: torch.Tensor) -> Lesson:
        """With what `head.positions` gives for the texts."""
        self.at, self.rows = at, torch.full(kept.shape, -1).masked_scatter(kept, torch.arange(len(at.state)))
        return self

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        """The model's states that predict the drawn tokens of some of the texts, (n L, D)."""
        ids, entering = ([every[row] for row in rows] for every in (self.ids, self.entering))
        return self.texts.predicting(self._upper.hidden(ids, entering), ids)


@torch.no_grad()
def base_states(policy: SplitModel, model: PeftModel, lesson: Lesson) -> None:
    """Put the base's states and normalisers in place of those of the student that drew the texts."""
    model.eval()
    texts = lesson.texts
    log_z, hidden = torch.empty_like(texts.log_z), torch.empty_like(texts.hidden)
    with adapter_off(model):
        for rows in torch.arange(len(texts.ids)).split(TEXTS):
            found = lesson.hidden(rows.tolist())
            hidden[rows] = found.view(len(rows), *hidden.shape[1:]).to(hidden)
            parts = found.split(chunk_positions(len(policy.weight)))
            sums = [policy.logits(part).float().logsumexp(1) for part in parts]
            log_z[rows] = torch.cat(sums).view(len(rows), -1).cpu()
    lesson.texts = replace(texts, hidden=hidden, log_z=log_z)


def train_trunk(
    model: PeftModel, policy: SplitModel, head: PhraseHead, lessons: Sequence[Lesson], options: PhraseOptions
) -> list[float]:
    """Adam over all texts `trunk_epochs` times; the mean loss of every epoch, over the positions learnt from."""
    generator = torch.Generator().manual_seed(options.seed)
    trunk = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name and in_block(name)]
    optimizer = torch.optim.Adam(
        [{"params": trunk, "lr": options.trunk_lr}, {"params": [head.offset], "lr": options.lr}]
    )
    batches = [(lesson, rows) for lesson in lessons for rows in torch.arange(len(lesson.texts.ids)).split(BATCH)]
    steps, losses = options.trunk_epochs * len(batches), []
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 8) * max(0.02, 1 - s / steps))
    for epoch in range(options.trunk_epochs):
        total, positions = 0.0, 0
        for number, place in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
            lesson, rows = batches[place]
            chosen = _chosen(head, lesson, rows, generator)
            count = int(chosen.sum())
            optimizer.zero_grad(set_to_none=True)
            for part, where in zip(rows.split(TEXTS), chosen.split(TEXTS), strict=True):
                loss = _loss(policy, head, lesson, part, where) * (int(where.sum()) / count)
                loss.backward()
                total += loss.item() * count
            optimizer.step()
            warm.step()
            positions += count
            report(epoch * len(batches) + number + 1, steps)
        losses.append(total / max(1, positions))
    return losses


def _chosen(head: PhraseHead, lesson: Lesson, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The positions of some texts that are learnt from, (n, L) bool; of every text one at least."""
    places = lesson.rows[rows]
    known = places >= 0
    left = torch.zeros(places.shape)
    with torch.no_grad():
        left[known] = head.kl(lesson.at, places[known])[0]
    chosen = known & ((left > WORTH_LEARNING) | (torch.rand(places.shape, generator=generator) < 0.25))
    chosen[torch.arange(len(rows)), known.int().argmax(1)] |= known.any(1)
    return chosen


def _loss(
    policy: SplitModel, head: PhraseHead, lesson: Lesson, rows: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Mean KL over the chosen positions of these texts."""
    if not chosen.any():
        return head.offset.sum() * 0
    hidden = lesson.hidden(rows.tolist())[chosen.flatten()]
    return head.state_loss(policy, hidden, lesson.at, lesson.rows[rows][chosen])
