"""The upper blocks of a model on their own: what enters them is made once, since the blocks below never change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..base.split_model import SplitModel


class _Reached(Exception):
    """The states that enter a block are there; nothing above it is of interest."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class UpperBlocks:
    """Runs a model from one of its blocks on.

    Args:
        first: the block's full name, e.g. "model.layers.20".

    A model that treats its blocks by their number gives other states without the lower ones; it is asked, and then run
    as a whole (`whole`).
    """

    def __init__(self, policy: SplitModel, first: str) -> None:
        self._policy = policy
        name, _, number = first.rpartition(".")
        parent, _, self._attribute = name.rpartition(".")
        self._parent, self._number = policy.model.get_submodule(parent), int(number)
        self._blocks = list(getattr(self._parent, self._attribute))
        self.whole = not self._agrees()

    @torch.no_grad()
    def entering(self, ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """What enters the first block, (L, D) for each text; the ids themselves where the model is run as a whole."""
        if self.whole:
            return ids
        with self._hooked(_raise_states):
            try:
                self._policy.hidden(_padded(ids, self._policy))
            except _Reached as reached:
                return [states[: len(one)].clone() for states, one in zip(reached.states, ids, strict=True)]
        raise AssertionError("a block was not run")  # every model runs its blocks

    def hidden(self, ids: list[torch.Tensor], entering: list[torch.Tensor]) -> torch.Tensor:
        """Last hidden states, (B, T, D), of texts of other lengths, which are padded at their ends."""
        padded = _padded(ids, self._policy)  # at the end: nothing before it sees it
        if self.whole:
            return self._policy.hidden(padded)
        states = pad_sequence(entering, batch_first=True).to(padded.device)
        blocks = getattr(self._parent, self._attribute)
        setattr(self._parent, self._attribute, nn.ModuleList(self._blocks[self._number :]))
        try:
            with self._hooked(lambda given: states):
                return self._policy.hidden(padded)
        finally:
            setattr(self._parent, self._attribute, blocks)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether eight tokens have the same last states either way."""
        self.whole = False
        rows = self._policy.weight.shape[0]
        ids = [torch.arange(rows // 2, rows // 2 + 8).remainder(rows)]
        expected = self._policy.hidden(_padded(ids, self._policy))
        try:
            found = self.hidden(ids, self.entering(ids))
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        return bool(torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3))

    @contextmanager
    def _hooked(self, swap: Any) -> Iterator[None]:
        """`swap` on the states that enter the first block."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (swap(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": swap(kwargs["hidden_states"])}

        handle = self._blocks[self._number].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _raise_states(states: torch.Tensor) -> torch.Tensor:
    raise _Reached(states)


def _padded(ids: list[torch.Tensor], policy: SplitModel) -> torch.Tensor:
    return pad_sequence(ids, batch_first=True).to(policy.weight.device)
