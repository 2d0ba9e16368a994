"""The set head: an output term of rank K that raises whole sets of tokens, carried as LoRA on the output embedding.

    logits_i += sum_k 1[i in S_k] (a_k . h + b_k)

In PEFT's terms: lora_A = a (K, D), lora_B = F^T (V, K), the sets' indicators, frozen, with lora_B's bias F^T b (V,)
and scaling 1. With a = 0 it is exactly a logit bias; with a != 0 the tilt depends on the context. Attention and MLP
alone cannot do this on a small model with a frozen tied head: the rows of a set share no common direction.

The base's weights are never written, so an output embedding that is tied to the input one is safe.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .errors import XFactorError


def head_name(model: PreTrainedModel) -> str:
    """The output embedding's full name, e.g. "lm_head" or "embed_out"."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def with_set_head(config: LoraConfig, model: PreTrainedModel, sets: int, *, alone: bool) -> LoraConfig:
    """Extend a LoRA configuration by the output embedding, at rank `sets` and scaling 1."""
    name = head_name(model)
    config.target_modules = {name} if alone else {*config.target_modules, name}
    config.rank_pattern = {f"^{name}": sets}
    config.alpha_pattern = {f"^{name}": sets}
    config.lora_bias = True
    return config


class SetHead(nn.Module):
    """The set head of one adapter, with b as a parameter of K numbers.

    `write` puts b into lora_B's bias, where generation, saving and loading find it; call it after b changes.

    Args:
        layer: the output embedding as PEFT wrapped it.
        members: F, (K, V), 0/1.
        adapter: PEFT's name of the adapter.
    """

    def __init__(self, layer: LoraLayer, members: torch.Tensor, adapter: str = "default") -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.register_buffer("members", members.float(), persistent=False)
        self.offset = nn.Parameter(torch.zeros(len(members), device=members.device))
        side_a, side_b = layer.lora_A[adapter], layer.lora_B[adapter]
        if side_b.weight.shape != members.T.shape:
            raise XFactorError(f"the set head holds {side_b.weight.shape[1]} sets, not {len(members)}")
        with torch.no_grad():
            side_a.weight.zero_()
            side_b.weight.copy_(members.T)
            side_b.bias.zero_()
        side_b.requires_grad_(False)

    @property
    def direction(self) -> nn.Parameter:
        """a, (K, D)."""
        return self.layer.lora_A[self.adapter].weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """s = a h + b; (..., D) -> (..., K), float32."""
        return hidden.to(self.direction.dtype) @ self.direction.T + self.offset

    @torch.no_grad()
    def write(self) -> None:
        self.layer.lora_B[self.adapter].bias.copy_(self.offset @ self.members)

    @torch.no_grad()
    def shift(self, amount: torch.Tensor) -> None:
        """b += amount (K,), and write."""
        self.offset += amount.to(self.offset)
        self.write()


def freeze_block_biases(model: nn.Module) -> None:
    """`lora_bias` gives every LoRA layer a bias at 0; outside the set head it stays there."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith(".bias"):
            parameter.requires_grad_(False)


def has_set_head(model: nn.Module) -> bool:
    """Whether the output embedding carries LoRA."""
    return isinstance(model.get_output_embeddings(), LoraLayer)
