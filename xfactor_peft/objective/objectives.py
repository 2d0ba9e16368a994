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
        self,
        split_model: SplitModel,
        target: UniformTarget,
        kl_to_base: float = 0.0,
        adapter_off: AdapterOff | None = None,
    ) -> None:
        super().__init__()
        if kl_to_base and adapter_off is None:
            raise XFactorError("`kl_to_base` needs `method=lora`: without an adapter to switch off there is no base")
        self.model = split_model.model
        self._split_model, self._weight, self._off = split_model, kl_to_base, adapter_off
        device = split_model.weight.device
        self.register_buffer("target", target.probabilities(device), persistent=False)
        self.register_buffer("mask", target.tokens.mask(device), persistent=False)

    def forward(self, ids: torch.Tensor) -> KLResult:
        split_model = self._split_model
        hidden = split_model.hidden(ids)
        result = kl_loss(hidden, split_model.weight, self.target, self.mask, bias=split_model.bias)
        if not self._weight or self._off is None:
            return result
        teacher = Teacher(base_hidden(split_model, ids, self._off), torch.zeros_like(self.target))
        members = self.mask[None].float()
        near = tilted_kl_loss(hidden, split_model.weight, teacher, members, bias=split_model.bias)
        return KLResult(result.loss + self._weight * near.loss, result.set_mass)


class TiltedObjective(nn.Module):
    """Mean D_KL(q_lambda || model); the teacher q_lambda is the same weights with the adapter off, tilted."""

    members: torch.Tensor
    strengths: torch.Tensor

    def __init__(
        self, split_model: SplitModel, target: TiltedTarget, adapter_off: AdapterOff, head: SetHead | None = None
    ) -> None:
        super().__init__()
        self.model = split_model.model
        self.head = head
        self._split_model, self._off = split_model, adapter_off
        self.register_buffer("members", target.members(split_model.weight.device), persistent=False)
        self.register_buffer("strengths", torch.zeros(len(self.members), device=self.members.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> KLResult:
        split_model = self._split_model
        hidden = split_model.hidden(ids)
        teacher = Teacher(base_hidden(split_model, ids, self._off), self.strengths @ self.members)
        set_logits = self.head(hidden) if self.head is not None else None
        result = tilted_kl_loss(
            hidden, split_model.weight, teacher, self.members, bias=split_model.bias, set_logits=set_logits
        )
        return KLResult(result.loss, result.set_mass[0])


@torch.no_grad()
def base_hidden(split_model: SplitModel, ids: torch.Tensor, adapter_off: AdapterOff) -> torch.Tensor:
    """The base's states, (B*T, D), from the same weights."""
    with adapter_off():
        return split_model.hidden(ids).flatten(0, 1)
