"""Sampling text, and sampling many sequences of one length for a fair estimate of R."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import XFactorError
from ..options import SamplingOptions


def encode_prompt(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, prompt: str, new: int) -> list[int]:
    """Ids of a prompt; an empty one becomes BOS.

    Raises:
        XFactorError: prompt and continuation exceed the model's context, or an empty prompt has no BOS.
    """
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        if tokenizer.bos_token_id is None:
            raise XFactorError("an empty prompt needs a tokenizer with a BOS token; give a prompt")
        ids = [tokenizer.bos_token_id]
    context = getattr(model.config, "max_position_embeddings", None)
    if context and len(ids) + new > context:
        raise XFactorError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {new} exceed the model's context of "
            f"{context}; shorten one of them"
        )
    return ids


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: SamplingOptions
) -> list[int]:
    """Continue one prompt; returns the generated ids (EOS, if reached, is left out)."""
    ids = encode_prompt(tokenizer, model, prompt, options.max_new_tokens)
    output = _sample(model, torch.tensor([ids]), options, pad_token_id=tokenizer.pad_token_id)
    new = output[0, len(ids) :].tolist()
    return [i for i in new if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]


def generate_in_pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: SamplingOptions, piece: int = 8
) -> Iterator[list[int]]:
    """Continue one prompt and yield the generated ids so far, `piece` more each time, until EOS or the full length.

    Every piece reads the text again and has a seed of its own, so the text differs from that of `generate`.
    """
    start = encode_prompt(tokenizer, model, prompt, options.max_new_tokens)
    new: list[int] = []
    while len(new) < options.max_new_tokens:
        part = replace(options, max_new_tokens=min(piece, options.max_new_tokens - len(new)))
        seed = options.seed * 1_000_003 + len(new)
        ids = torch.tensor([start + new])
        more = _sample(model, ids, part, seed=seed, pad_token_id=tokenizer.pad_token_id)[0, ids.shape[1] :].tolist()
        if tokenizer.eos_token_id in more:
            yield new + more[: more.index(tokenizer.eos_token_id)]
            return
        new = new + more
        yield new


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: SamplingOptions,
    **extra: Any,
) -> list[list[int]]:
    """Continue several prompts in one batch, shorter ones padded on the left; ids as in `generate`, a row each.

    `extra` goes to the model's `generate`, e.g. PEFT's `adapter_names`, one a prompt.
    """
    rows = [encode_prompt(tokenizer, model, prompt, options.max_new_tokens) for prompt in prompts]
    if not rows:
        return []
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = _sample(model, ids, options, pad_token_id=pad, attention_mask=mask.to(model.device), **extra)
    stops = (tokenizer.eos_token_id, pad)
    return [[i for i in new if i not in stops] for new in output[:, width:].tolist()]


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    ids: torch.Tensor,
    options: SamplingOptions,
    seed: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`generate` under its own random state, in eval mode; both are put back afterwards."""
    was_training = model.training
    model.eval()
    device = model.device
    continued = cast(Callable[..., torch.Tensor], model.generate)  # from GenerationMixin, which every causal model has
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed if seed is None else seed)
        ids = ids.to(device)
        kwargs.setdefault("attention_mask", torch.ones_like(ids))
        output = continued(input_ids=ids, use_cache=True, **options.kwargs(), **kwargs)
    model.train(was_training)
    return output
