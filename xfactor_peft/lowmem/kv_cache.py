"""A key-value cache whose room is reserved once.

transformers' `DynamicCache` concatenates: every step copies all keys and values there are. Here a step writes its own
and hands out a view.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """A `DynamicLayer` for at most `capacity` tokens: (B, H, capacity, D), of which the filled part is seen."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._room: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = [x.new_empty(*x.shape[:2], self._capacity, x.shape[3]) for x in (key_states, value_states)]
        self.keys, self.values = (room[:, :, :0] for room in self._room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values


def reserved_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens; layers with a window or a state of their own stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence takes in the cache: 2 L H_kv D, in `dtype`."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize
