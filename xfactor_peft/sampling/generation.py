"""Sampling text, and sampling many sequences of one length for a fair estimate of R."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
            f"the prompt's {len(ids)} tokens and `max_new_tokens={new}` exceed the model's context of "
            f"{context}; shorten one of them"
        )
    return ids


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: SamplingOptions
) -> list[int]:
    """Continue one prompt; returns the generated ids (EOS, if reached, is left out)."""
    *_, ids = stream(model, tokenizer, prompt, options, options.max_new_tokens)
    return ids


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: SamplingOptions, piece: int = 8
) -> Iterator[list[int]]:
    """Continue one prompt and yield the generated ids so far, `piece` more each time, until EOS or the full length.

    The ids are those of `generate`: a piece begins with the key-value cache and the random state of the one before.
    Between pieces nothing runs and nothing global is changed, so the iterator may be left at any time.
    """
    start = encode_prompt(tokenizer, model, prompt, options.max_new_tokens)
    ids, cache, random = torch.tensor([start]), None, _RandomState(options.seed)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    left = options.max_new_tokens
    while left > 0:
        part = replace(options, max_new_tokens=min(piece, left))
        left -= part.max_new_tokens
        output = _sample(
            model, ids, part, random, pad_token_id=tokenizer.pad_token_id, past_key_values=cache,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids, cache = output.sequences, output.past_key_values
        yield _without_ends(tokenizer, ids[0, len(start) :])
        if int(ids[0, -1]) in ends:
            return


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
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_attention_mask=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"].to(model.device)
    random = _RandomState(options.seed)
    output = _sample(model, ids, options, random, pad_token_id=tokenizer.pad_token_id, attention_mask=mask, **extra)
    return [_without_ends(tokenizer, row) for row in output[:, ids.shape[1] :]]


def _without_ends(tokenizer: PreTrainedTokenizerBase, new: torch.Tensor) -> list[int]:
    return [i for i in new.tolist() if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]


class _RandomState:
    """A random state beside the global one; each `active` block begins where the last one ended."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: list[torch.Tensor] = []

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self._states:
                torch.set_rng_state(self._states[0])
                for state in self._states[1:]:
                    torch.cuda.set_rng_state(state, device)
            else:
                torch.manual_seed(self._seed)
            yield
            self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    ids: torch.Tensor,
    options: SamplingOptions,
    random: _RandomState,
    **kwargs: Any,
) -> Any:
    """`generate` under `random`, in eval mode; the global random state and the model's mode are restored afterwards."""
    was_training = model.training
    model.eval()
    generate = cast(Callable[..., Any], model.generate)  # from GenerationMixin, which every causal model has
    try:
        with random.active(model.device):
            ids = ids.to(model.device)
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
            return generate(input_ids=ids, use_cache=True, **options.kwargs(), **kwargs)
    finally:
        model.train(was_training)
