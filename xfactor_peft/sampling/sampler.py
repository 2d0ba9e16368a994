"""Many samples of one length from the model's own distribution, for everything that is measured.

`generate` of transformers also applies what the checkpoint's `generation_config.json` asks for (penalties, forced
tokens); here nothing does but `SamplingOptions`. Prompts of several lengths share a batch without padding: all rows
begin with as many tokens as the shortest prompt has, and a longer prompt goes on dictating its row until it ends.

The token at a position is the one whose interval of the cumulative distribution holds a uniform number that belongs to
(seed, row, position), so a text does not depend on which other texts share its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ..base.split_model import SplitModel
from ..errors import XFactorError
from ..lowmem.allocator import give_back_pages
from ..lowmem.kv_cache import reserved_cache, token_bytes
from ..objective.kl import chunk_positions
from ..options import SamplingOptions
from ..progress import Progress

CACHE_BYTES = 128 * 2**20
"""Most that the key-value cache of one batch takes: training is what memory is for."""
LEAST_BYTES = 32 * 2**20
"""What it may take in any case: a batch of few texts takes nearly as long."""
ALIKE = 16
"""Batches, and the texts in them that a token is drawn for, are multiples of this many: every other number of rows is
compiled anew, and what is compiled stays in memory."""
_room: ContextVar[tuple[Callable[[], int], int]] = ContextVar("room", default=(lambda: CACHE_BYTES, CACHE_BYTES))


@contextmanager
def cache_limit(room: Callable[[], int], most: int = CACHE_BYTES) -> Iterator[None]:
    """Inside, the cache of a batch takes at most as many bytes as `room` says when samples are asked for, and `most`.

    It may always take `LEAST_BYTES`.
    """
    token = _room.set((room, most))
    try:
        yield
    finally:
        _room.reset(token)


@dataclass(frozen=True)
class Samples:
    """N texts: prompts of their own lengths, each continued by L tokens.

    Attributes:
        ids: (N, W) with W the longest prompt + L; what lies behind a shorter text is no part of it.
        starts: (N,), lengths of the prompts.
        length: L.
        states: (N, L, D), the states that predict the generated tokens, as they were when these were drawn.
        rows: (N,), which of the prompts each text begins with; they come sorted by length.
        masses: (N, L, K), the exact masses of K sets at these positions, in the distribution that tokens are drawn
            from; None where none were asked.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    length: int
    states: torch.Tensor
    rows: torch.Tensor
    masses: torch.Tensor | None = None

    @property
    def continuations(self) -> torch.Tensor:
        """The generated ids, (N, L)."""
        return self.ids.gather(1, self._positions(0))

    def split(self, positions: int) -> Iterator[Samples]:
        """The same texts, so many at a time that they hold about `positions` tokens; at least one."""
        for rows in torch.arange(len(self.ids)).split(max(1, positions // self.ids.shape[1])):
            masses = None if self.masses is None else self.masses[rows]
            yield Samples(self.ids[rows], self.starts[rows], self.length, self.states[rows], self.rows[rows], masses)

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of states (N, W, D) of a forward pass over `ids`, those that predict the generated tokens: (N, L, D)."""
        positions = self._positions(-1).to(hidden.device)
        return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))

    def _positions(self, shift: int) -> torch.Tensor:
        return self.starts[:, None] + torch.arange(self.length) + shift


class Watcher(Protocol):
    """Looks on while texts are drawn, and may change what they are drawn from."""

    def logits(self, texts: torch.Tensor, z: torch.Tensor, states: torch.Tensor) -> None:
        """Before tokens of the texts (n,), by their prompts' numbers, are drawn from logits z (n, V), which it may
        change in place; `states` (n, D) made them."""

    def drawn(self, texts: torch.Tensor, ids: torch.Tensor) -> None:
        """After they were drawn: ids (n,)."""


def check_ids(prompts: Sequence[Sequence[int]], rows: int) -> None:
    """Raises XFactorError unless every prompt has ids, all of them of the `rows` of the input embedding."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise XFactorError(f"prompt {number} holds no token; a sample needs at least one to begin with")
        wrong = next((i for i in prompt if not 0 <= i < rows), None)
        if wrong is not None:
            raise XFactorError(
                f"prompt {number} holds the id {wrong}, but the model embeds ids from 0 to {rows - 1}; use the model's "
                "own tokenizer"
            )


def tokens_at_once(split_model: SplitModel) -> int:
    """How many tokens, over all texts of a batch, have a key-value cache within the limit."""
    model = split_model.model
    room, most = _room.get()
    size = min(most, max(LEAST_BYTES, room()))
    return size // token_bytes(model.config, model.dtype)


def batches_of(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of texts of these lengths in batches, short ones first; in a batch all are as long as the longest.

    A batch has at most `most` tokens, or one text; but for the last, a multiple of `ALIKE` texts where it has as many.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        while batch and (len(batch) + 1) * lengths[number] > most:
            count = len(batch) // ALIKE * ALIKE or len(batch)
            yield batch[:count]
            batch = batch[count:]
        batch.append(number)
    if batch:
        yield batch


def sample(
    split_model: SplitModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    banned: Sequence[int] = (),
    members: torch.Tensor | None = None,
    tilts: torch.Tensor | None = None,
    watcher: Watcher | None = None,
) -> Iterator[Samples]:
    """Continue prompts (ids) by exactly `options.max_new_tokens` tokens, in as large batches as the cache may take.

    Args:
        split_model: its `tilt`, when it has one, is added to the logits: an exact logit bias.
        banned: ids that are never drawn, so that no text ends early.
        members: F (K, V) float32: also give the masses of these sets. Their mean over the model's own samples is the
            rate with the sampling noise of each token averaged out exactly (Rao and Blackwell).
        tilts: (N, K), an exact logit bias on these sets for each text.
        watcher: told of every draw.

    Raises:
        XFactorError: a prompt is empty, or holds an id that the model has no embedding for.
    """
    embedding = cast(torch.nn.Embedding, split_model.model.get_input_embeddings())
    check_ids(prompts, embedding.weight.shape[0])
    new = options.max_new_tokens
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(options.seed), dtype=torch.float64)
    never = torch.tensor(sorted(banned), dtype=torch.long, device=split_model.weight.device)
    draw, count = _Draw(options, never, members, tilts, watcher), 0
    for part in batches_of([len(prompt) + new for prompt in prompts], tokens_at_once(split_model)):
        give_back_pages()  # of the batch before, which may have been of another shape
        done = Progress(count, len(part), len(prompts))
        count += len(part)
        own = [list(prompts[row]) for row in part]
        yield _sample_batch(split_model, own, uniforms[part], draw, torch.tensor(part), done)


@torch.no_grad()
def _sample_batch(
    split_model: SplitModel,
    prompts: list[list[int]],
    uniforms: torch.Tensor,
    draw: _Draw,
    texts: torch.Tensor,
    done: Progress,
) -> Samples:
    model, device = split_model.model, split_model.weight.device
    starts = torch.tensor([len(prompt) for prompt in prompts])
    shortest, new = int(starts.min()), uniforms.shape[1]
    width = int(starts.max()) + new
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    states = torch.empty(len(prompts), new, split_model.weight.shape[1], dtype=split_model.weight.dtype, device=device)
    masses = torch.empty(len(prompts), new, draw.sets)
    was_training = model.training
    model.eval()
    cache = reserved_cache(model.config, width)
    following = ids[:, :shortest]
    for position in range(shortest, width):
        output = model.base_model(input_ids=following.to(device), past_key_values=cache, use_cache=True)
        last = output.last_hidden_state[:, -1].contiguous()
        made = position - starts  # of each row, how many tokens were generated before this position
        rows = ((made >= 0) & (made < new)).nonzero().squeeze(1)
        if len(rows):
            states[rows.to(device), made[rows].to(device)] = last[rows.to(device)]
            near = rows if draw.watched else _alike(rows, len(ids))
            at = near, made[near].clamp(0, new - 1)
            drawn, mass = draw(split_model, last[near.to(device)], uniforms[at], texts[near])
            chosen = torch.searchsorted(near, rows)  # the others around them have their token already
            masses[rows, made[rows]] = mass[chosen]
            ids[rows, position] = drawn.cpu()[chosen]
        following = ids[:, position : position + 1]
        done.report((position + 1 - shortest) / (width - shortest))
    model.train(was_training)
    return Samples(ids, starts, new, states, texts, masses if draw.sets else None)


def _alike(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Sorted rows, and as many around them as make it multiples of `ALIKE`, below `most`."""
    return torch.arange(int(rows[0]) // ALIKE * ALIKE, min(most, (int(rows[-1]) // ALIKE + 1) * ALIKE))


def continued(
    split_model: SplitModel, ids: torch.Tensor, new: int, *, seed: int, banned: Sequence[int] = ()
) -> torch.Tensor:
    """(N, P) ids continued by `new` tokens each -> (N, P + new)."""
    options = SamplingOptions(max_new_tokens=new, seed=seed)
    return torch.cat([batch.ids for batch in sample(split_model, ids.tolist(), options, banned)])


class _Draw:
    """Tokens from states: logits, decoding settings, softmax, one uniform number a row."""

    def __init__(
        self,
        options: SamplingOptions,
        banned: torch.Tensor,
        members: torch.Tensor | None,
        tilts: torch.Tensor | None,
        watcher: Watcher | None,
    ) -> None:
        self._options, self._banned, self._watcher = options, banned, watcher
        self._members, self._tilts = members, None if tilts is None else tilts.to(banned.device)
        self.watched = watcher is not None
        self.sets = 0 if members is None else len(members)
        self._warpers = [
            *([TopKLogitsWarper(options.top_k)] if options.top_k else []),
            *([TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []),
        ]

    def __call__(
        self, split_model: SplitModel, states: torch.Tensor, uniforms: torch.Tensor, texts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, D) states and (n,) uniform numbers in [0, 1) -> (n,) ids and (n, K) masses, in chunks of logits."""
        step = chunk_positions(len(split_model.weight))
        ids, masses = [], torch.empty(len(states), self.sets)
        for rows in torch.arange(len(states)).split(step):
            z = split_model.logits(states[rows]).float()
            if self._tilts is not None and self._members is not None:
                z.addmm_(self._tilts[texts[rows].to(z.device)], self._members)
            z.index_fill_(1, self._banned, float("-inf"))
            if self._watcher is not None:
                self._watcher.logits(texts[rows], z, states[rows])
            chosen, masses[rows] = self._drawn(z, uniforms[rows].to(z.device))
            if self._watcher is not None:
                self._watcher.drawn(texts[rows], chosen)
            ids.append(chosen)
        return torch.cat(ids), masses

    def _drawn(self, z: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (n,) and masses (n, K) from logits (n, V), which are used up."""
        if self._options.temperature == 0:
            ids = z.argmax(1)
            return ids, z.new_empty(len(ids), 0) if self._members is None else self._members.T[ids].cpu()
        if self._options.temperature != 1:
            z /= self._options.temperature
        for warper in self._warpers:
            z = warper(None, z)
        z -= z.amax(1, keepdim=True)
        p = z.exp_()
        masses = p.new_empty(len(p), 0) if self._members is None else p @ self._members.T / p.sum(1, keepdim=True)
        cumulative = p.cumsum_(1)
        total = cumulative[:, -1:]
        wanted = (uniforms[:, None] * total).to(total.dtype)
        wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))  # rounding may have reached it
        return torch.searchsorted(cumulative, wanted, right=True).squeeze(1), masses.cpu()
