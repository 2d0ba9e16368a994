"""Refuse a KV cache under other adapters than those that it was made under."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import XFactorError


class CacheGuard:
    """Hooks that mark every KV cache with the adapters that were active, and compare when it is used again.

    Keys and values depend on the adapters, so a cache that is carried over a swap gives text of neither adapter
    without any error. A cache without a mark counts as made under `state()` of the moment the guard began.

    Args:
        model: the base, whose forward pass (and that of its decoder, which some heads call directly) is watched.
        state: what identifies the active adapters, scales included.
    """

    def __init__(self, model: PreTrainedModel, state: Callable[[], Hashable]) -> None:
        self._state, self._first = state, state()
        self._mark_name = f"_xfactor_made_under_{id(self)}"  # another guard of the same model has marks of its own
        for module in dict.fromkeys([model, model.get_decoder()]):
            module.register_forward_pre_hook(self._check, with_kwargs=True)
            module.register_forward_hook(self._mark, with_kwargs=True)

    def _check(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            return
        if getattr(cache, self._mark_name, self._first) != self._state():
            raise XFactorError(
                "this KV cache was made under other adapters than those active now; start again from the whole text"
            )

    def _mark(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, self._mark_name, self._state())
