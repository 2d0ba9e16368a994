"""What a step minimises: ids (B, T) -> loss and set mass, as modules that accelerate can prepare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..base.split_model import SplitModel
from ..errors import XFactorError
from ..lora.set_head import SetHead
from .kl import KLResult, Teacher, kl_loss, tilted_kl_loss
from .targets import TiltedTarget, UniformTarget

AdapterOff = Callable[[], AbstractContextManager]


class UniformObjective(nn.Module):
    """Mean D_KL(P || model) over all B*T positions, plus W times mean D_KL(base || model)."""

    target: torch.Tensor
    mask: torch.Tensor

    def __init__(
        self, halves: SplitModel, target: UniformTarget, kl_to_base: float = 0.0, adapter_off: AdapterOff | None = None
    ) -> None:
        super().__init__()
        if kl_to_base and adapter_off is None:
            raise XFactorError("--kl-to-base needs --method lora: without an adapter to switch off there is no base")
        self.model = halves.model
        self._halves, self._weight, self._off = halves, kl_to_base, adapter_off
        device = halves.weight.device
        self.register_buffer("target", target.probabilities(device), persistent=False)
        self.register_buffer("mask", target.tokens.mask(device), persistent=False)

    def forward(self, ids: torch.Tensor) -> KLResult:
        halves = self._halves
        hidden = halves.hidden(ids)
        result = kl_loss(hidden, halves.weight, self.target, self.mask, bias=halves.bias)
        if not self._weight or self._off is None:
            return result
        teacher = Teacher(base_hidden(halves, ids, self._off), torch.zeros_like(self.target))
        members = self.mask[None].float()
        near = tilted_kl_loss(hidden, halves.weight, teacher, members, bias=halves.bias)
        return KLResult(result.loss + self._weight * near.loss, result.set_mass)


class TiltedObjective(nn.Module):
    """Mean D_KL(q_lambda || model); the teacher q_lambda is the same weights with the adapter off, tilted."""

    members: torch.Tensor
    strengths: torch.Tensor

    def __init__(
        self, halves: SplitModel, target: TiltedTarget, adapter_off: AdapterOff, head: SetHead | None = None
    ) -> None:
        super().__init__()
        self.model = halves.model
        self.head = head
        self._halves, self._off = halves, adapter_off
        self.register_buffer("members", target.members(halves.weight.device), persistent=False)
        self.register_buffer("strengths", torch.zeros(len(self.members), device=self.members.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> KLResult:
        halves = self._halves
        hidden = halves.hidden(ids)
        teacher = Teacher(base_hidden(halves, ids, self._off), self.strengths @ self.members)
        set_logits = self.head(hidden) if self.head is not None else None
        result = tilted_kl_loss(hidden, halves.weight, teacher, self.members, bias=halves.bias, set_logits=set_logits)
        return KLResult(result.loss, result.set_mass[0])


@torch.no_grad()
def base_hidden(halves: SplitModel, ids: torch.Tensor, adapter_off: AdapterOff) -> torch.Tensor:
    """The base's states, (B*T, D), from the same weights."""
    with adapter_off():
        return halves.hidden(ids).flatten(0, 1)
