"""Text for people, by `generate` of transformers; what is measured is drawn by `sampler`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import XFactorError
from ..options import ChatOptions, SamplingOptions
from ..tokens.ends import end_ids, pad_id, text_ids, until_end
from .chat import chat_used, question


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    prompt: str,
    new: int,
    chat: ChatOptions = ChatOptions(),
) -> list[int]:
    """Ids of a prompt that is to go on, or of a question under the chat template; an empty prompt becomes BOS.

    Raises:
        XFactorError: prompt and continuation exceed the model's context, an empty prompt has no BOS, or the chat
            template is missing or refuses.
    """
    if chat_used(tokenizer, chat):
        ids = question(tokenizer, prompt, chat)
    else:
        ids = text_ids(tokenizer, prompt) if prompt else []
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: SamplingOptions,
    chat: ChatOptions = ChatOptions(),
) -> list[int]:
    """Continue one prompt, or answer it; returns the generated ids before the end token that ended them, if one did."""
    *_, ids = stream(model, tokenizer, prompt, options, options.max_new_tokens, chat)
    return ids


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: SamplingOptions,
    piece: int = 8,
    chat: ChatOptions = ChatOptions(),
) -> Iterator[list[int]]:
    """Continue one prompt and yield the generated ids so far, `piece` more each time, until an end or the full length.

    The ids are those of `generate`: a piece begins with the key-value cache and the random state of the one before.
    Between pieces nothing runs and nothing global is changed, so the iterator may be left at any time.
    """
    start = encode_prompt(tokenizer, model, prompt, options.max_new_tokens, chat)
    ids, cache, random = torch.tensor([start]), None, _RandomState(seed_for(options.seed, start))
    ends = end_ids(tokenizer, model)
    left = options.max_new_tokens
    while left > 0:
        part = replace(options, max_new_tokens=min(piece, left))
        left -= part.max_new_tokens
        output = _sample(model, tokenizer, ids, part, random, past_key_values=cache, return_dict_in_generate=True)
        ids, cache = output.sequences, output.past_key_values
        yield until_end(ids[0, len(start) :].tolist(), ends)
        if int(ids[0, -1]) in ends:
            return


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: SamplingOptions,
    chat: ChatOptions = ChatOptions(),
    **extra: Any,
) -> list[list[int]]:
    """Continue several prompts in one batch, shorter ones padded on the left; ids as in `generate`, a row each.

    `extra` goes to the model's `generate`, e.g. PEFT's `adapter_names`, one a prompt.
    """
    rows = [encode_prompt(tokenizer, model, prompt, options.max_new_tokens, chat) for prompt in prompts]
    if not rows:
        return []
    ends = end_ids(tokenizer, model)
    ids = pad_sequence([torch.tensor(row) for row in rows], True, pad_id(tokenizer, model), "left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, "left")
    random = _RandomState(seed_for(options.seed, [i for row in rows for i in row]))
    output = _sample(model, tokenizer, ids, options, random, attention_mask=mask.to(model.device), **extra)
    return [until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


def unused_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What the checkpoint's `generation_config.json` would change in decoding; nothing of it is used here."""
    settings = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    about_else = re.compile(
        r"_?(output_.*|.*token_id|transformers_version|from_model_config|use_cache|return_.*|max_.*)"
    )
    return {
        name: value
        for name, value in settings.items()
        if not about_else.fullmatch(name)
        and (value not in (None, 0, 1) or (value == 1 and name in ("top_k", "no_repeat_ngram_size")))
    }


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Without the checkpoint's own decoding settings (penalties, beams, banned words), which `generate` would apply."""
    inner = getattr(model, "get_base_model", None)  # of PEFT's wrapper, which hands its settings on to it
    holders: list[Any] = [model, *([inner()] if inner else [])]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, before, strict=True):
            holder.generation_config = settings


def seed_for(seed: int, prompt: Sequence[int]) -> int:
    """The seed of one prompt's random numbers: each prompt (ids) has its own, whatever is generated before it.

    Under one seed the base and every adapter continue a prompt with the same numbers, so that they can be compared.
    """
    return int.from_bytes(hashlib.sha256(repr((seed, *prompt)).encode()).digest()[:8], "big") >> 1


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
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    options: SamplingOptions,
    random: _RandomState,
    **kwargs: Any,
) -> Any:
    """`generate` under `random`, in eval mode, with `options` alone; all that this changes is restored afterwards."""
    was_training = model.training
    model.eval()
    generate = cast(Callable[..., Any], model.generate)  # from GenerationMixin, which every causal model has
    ends, pad = end_ids(tokenizer, model) or None, pad_id(tokenizer, model)
    try:
        with random.active(model.device), _own_settings(model):
            ids = ids.to(model.device)
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
            settings = options.kwargs() | {"eos_token_id": ends, "pad_token_id": pad, "use_cache": True}
            return generate(input_ids=ids, **settings, **kwargs)
    finally:
        model.train(was_training)
