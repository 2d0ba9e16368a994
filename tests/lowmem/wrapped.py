"""LoRA by PEFT, on our layers or on its own, with adapters that do something."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from xfactor_peft.lowmem.peft_layers import custom_modules

TARGETS = {"gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}


def config(kind: str = "gpt2", *, ours: bool = True, **options) -> LoraConfig:
    made = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM", **options
    )
    if ours:
        made._register_custom_module(custom_modules())
    return made


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Adapters far from zero, so that every comparison sees them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
