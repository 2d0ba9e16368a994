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

from ..errors import XFactorError
from ..lowmem.peft_parts import side_a, side_b


def head_name(model: PreTrainedModel) -> str:
    """The output embedding's full name, e.g. "lm_head" or "embed_out"."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def with_set_head(config: LoraConfig, name: str, sets: int) -> LoraConfig:
    """Give the output embedding, which `config` targets by its `name`, rank `sets`, scaling 1 and a bias."""
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

    members: torch.Tensor

    def __init__(self, layer: LoraLayer, members: torch.Tensor, adapter: str = "default") -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.register_buffer("members", members.float(), persistent=False)
        self.offset = nn.Parameter(torch.zeros(len(members), device=members.device))
        a, b = side_a(layer, adapter), side_b(layer, adapter)
        if b.weight.shape != members.T.shape:
            raise XFactorError(f"the set head holds {b.weight.shape[1]} sets, not {len(members)}")
        with torch.no_grad():
            a.weight.zero_()
            b.weight.copy_(members.T)
            b.bias.zero_()
        b.requires_grad_(False)

    @property
    def direction(self) -> torch.Tensor:
        """a, (K, D)."""
        return side_a(self.layer, self.adapter).weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """s = a h + b; (..., D) -> (..., K), float32."""
        return hidden.to(self.direction.dtype) @ self.direction.T + self.offset

    @torch.no_grad()
    def write(self) -> None:
        side_b(self.layer, self.adapter).bias.copy_(self.offset @ self.members)

    @torch.no_grad()
    def set(self, direction: torch.Tensor, offset: torch.Tensor) -> None:
        """a (K, D) and b (K,) from here on, and write."""
        self.direction.copy_(direction)
        self.offset.copy_(offset)
        self.write()

    @torch.no_grad()
    def shift(self, amount: torch.Tensor) -> None:
        """b += amount (K,), and write."""
        self.offset.add_(amount.to(self.offset))
        self.write()


def freeze_block_biases(model: nn.Module) -> None:
    """`lora_bias` gives every LoRA layer a bias at 0; outside the set head it stays there."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith(".bias"):
            parameter.requires_grad_(False)
