"""A key-value cache whose memory is reserved once, in one piece.

transformers' `DynamicCache` concatenates: every step copies all keys and values there are. Here a step writes its own
and hands out a view. The one piece is large enough to have pages of its own, so that all of it goes back to the system
when the cache is dropped; small tensors would be strewn over the heap.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from ..errors import XFactorError


class _Memory:
    """Tensors of one shape and dtype, `count` of them, cut from one; others are made one by one."""

    def __init__(self, count: int) -> None:
        self._count, self._given = count, 0
        self._whole: torch.Tensor | None = None

    def tensor(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if self._whole is None:
            self._whole = like.new_empty(self._count, *shape)
        fits = self._whole.shape[1:] == shape and self._whole.dtype == like.dtype and self._whole.device == like.device
        if not fits or self._given == self._count:
            return like.new_empty(shape)
        self._given += 1
        return self._whole[self._given - 1]


class ReservedLayer(DynamicLayer):
    """A `DynamicLayer` for at most `capacity` tokens: (B, H, capacity, D), of which the filled part is seen."""

    def __init__(self, capacity: int, memory: _Memory) -> None:
        super().__init__()
        self._capacity, self._memory = capacity, memory
        self._reserved: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for x in (key_states, value_states):
            self._reserved.append(self._memory.tensor(x, (*x.shape[:2], self._capacity, x.shape[3])))
        self.keys, self.values = (whole[:, :, :0] for whole in self._reserved)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        for whole, new in zip(self._reserved, (key_states, value_states), strict=True):
            whole[:, :, start:stop] = new
        self.keys, self.values = (whole[:, :, :stop] for whole in self._reserved)
        return self.keys, self.values


def reserved_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens; layers with a window or a state of their own stay as transformers makes them."""
    cache = DynamicCache(config=config)
    memory = _Memory(2 * sum(type(layer) is DynamicLayer for layer in cache.layers))
    cache.layers = [ReservedLayer(capacity, memory) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence takes in the cache: 2 L H_kv D, in `dtype`.

    Raises:
        XFactorError: the model has no attention heads, so it has no such cache.
    """
    text = config.get_text_config()
    attention = getattr(text, "num_attention_heads", None)
    if attention is None:
        raise XFactorError(
            f"a {config.model_type} model has no attention heads and no key-value cache; it is not supported"
        )
    heads = getattr(text, "num_key_value_heads", None) or attention
    width = getattr(text, "head_dim", None) or text.hidden_size // attention
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize
