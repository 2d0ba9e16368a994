"""The texts that training looks at: random tokens, samples of the model itself, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..errors import XFactorError, text_of
from ..progress import phase
from ..tokens.ends import special_ids, text_ids
from .sampler import continued

OPENING = 8
"""Tokens of base text before a sample's own: the adapted model continues openings that the base wrote."""


def check_length(config: PretrainedConfig, seq_len: int) -> None:
    """Raises XFactorError for sequences longer than the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and seq_len > context:
        raise XFactorError(f"`seq_len={seq_len}` is longer than the model's context of {context}")


def tokens_left(base: Base, used: int) -> int:
    """Tokens that the model's context still holds after `used`; a large number when it has no limit."""
    context = getattr(base.model.config, "max_position_embeddings", None) or 1 << 20
    return context - used


def allowed_ids(base: Base) -> torch.Tensor:
    """Ids of the tokenizer's tokens without its special ones."""
    special = special_ids(base.tokenizer, base.model)
    return torch.tensor([i for i in range(min(len(base.tokenizer), base.vocab_size)) if i not in special])


def openings(base: Base, count: int, *, seed: int = 0, length: int = OPENING) -> torch.Tensor:
    """`count` beginnings of texts, drawn from the base after BOS: (count, length) ids; call it with adapters off.

    They look like prompts: BOS itself stays in front only where the tokenizer puts it before every text, and then
    counts. A model without a BOS token starts from a random token instead.
    """
    start = base.tokenizer.bos_token_id
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        ids = allowed_ids(base)
        first = ids[torch.randint(len(ids), (count, 1), generator=generator)]
    else:
        first = torch.full((count, 1), start)
    keep = start is None or base.tokenizer("a")["input_ids"][:1] == [start]
    new = length - 1 if keep else length
    if new == 0:
        return first
    special = special_ids(base.tokenizer, base.model)
    ids = continued(SplitModel(base.model), first, new, seed=seed + 17, banned=special)
    return ids if keep else ids[:, 1:]


def self_contexts(base: Base, count: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """`count` samples of the base of `length` tokens each, (count, length), drawn in batches with a KV cache."""
    head = openings(base, count, seed=seed, length=min(OPENING, length))
    rest = length - head.shape[1]
    if rest == 0:
        return head
    special = special_ids(base.tokenizer, base.model)
    return continued(SplitModel(base.model), head, rest, seed=seed + 29, banned=special)


def file_contexts(base: Base, path: Path, length: int) -> torch.Tensor:
    """A text file, tokenised and cut into windows of `length` tokens, (count, length).

    Raises:
        XFactorError: the file cannot be read, or holds fewer than `length` tokens.
    """
    text = text_of(path, f"`contexts={path}`")
    ids = torch.tensor(text_ids(base.tokenizer, text, truncation=False, verbose=False), dtype=torch.long)
    count = len(ids) // length
    if count == 0:
        raise XFactorError(f"`contexts={path}` holds {len(ids)} tokens, fewer than `seq_len={length}`")
    return ids[: count * length].view(count, length)


def batches(
    base: Base, contexts: str, batch_size: int, length: int, *, seed: int, pool_size: int = 256
) -> Iterator[torch.Tensor]:
    """Endless batches (batch_size, length) of contexts.

    `contexts` is "random" (uniform over the vocabulary, as in the source experiment), "self" (a pool of base samples,
    drawn once and reused across steps) or the name of a text file, all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    if contexts == "random":
        vocabulary = min(len(base.tokenizer), base.vocab_size)
        while True:
            yield torch.randint(vocabulary, (batch_size, length), generator=generator)
    with phase("drawing contexts"):
        own = contexts == "self"
        pool = self_contexts(base, pool_size, length, seed=seed) if own else file_contexts(base, Path(contexts), length)
    while True:
        yield pool[torch.randint(len(pool), (batch_size,), generator=generator)]


def context_pool(base: Base, contexts: str, length: int, *, seed: int, count: int = 256) -> torch.Tensor:
    """`count` contexts (count, length) of any of the three kinds, of a file at random; it may hold fewer."""
    if contexts == "random":
        return next(batches(base, contexts, count, length, seed=seed))
    if contexts == "self":
        return self_contexts(base, count, length, seed=seed)
    windows, generator = file_contexts(base, Path(contexts), length), torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:count].sort().values]
