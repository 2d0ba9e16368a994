"""Variants of LoRA: DoRA, rsLoRA and PiSSA as PEFT has them, and LoRA+.

- dora (Liu et al. 2024, arXiv:2402.09353): direction and magnitude of the weight's columns are trained separately.
- rslora (Kalajdzievski 2023, arXiv:2312.03732): scaling alpha / sqrt(r) in place of alpha / r.
- pissa (Meng et al. 2024, arXiv:2404.02948): B A starts as the r largest singular directions of W, which leave W.
- lora+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A (see `training.optimizers`).
"""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..lowmem.peft_parts import side_a, side_b

_START = "pissa_start"


def remember_start(model: PeftModel) -> None:
    """Keep PiSSA's A_0 and B_0 for `pissa_to_lora`."""
    start = {name: tuple(side.detach().clone() for side in _sides(layer)) for name, layer in _layers(model)}
    setattr(model, _START, start)


@torch.no_grad()
def pissa_to_lora(model: nn.Module) -> None:
    """Turn PiSSA into plain LoRA of rank 2r on the base's own weights; nothing to do for other models.

        W_res + s B A = W + s (B A - B_0 A_0) = W + s [B, -B_0] [A; A_0],      W_res = W - s B_0 A_0

    PiSSA takes B_0 A_0 out of the base. An adapter that needs the base changed could not be swapped, and switching it
    off would not give the base; so W_res + s B_0 A_0 replaces it (equal to W up to rounding). PEFT's own conversion
    (`save_pretrained(..., path_initial_model_for_weight_conversion)`) changes the file alone, not the model in memory.
    """
    start = getattr(model, _START, None)
    if not start or not isinstance(model, PeftModel):
        return
    for name, layer in _layers(model):
        (a, b), (a0, b0), base = _sides(layer), start[name], cast(nn.Linear | Conv1D, layer.get_base_layer())
        taken = layer.scaling["default"] * (b0 @ a0)
        base.weight.add_((taken.T if isinstance(base, Conv1D) else taken).to(base.weight.dtype))
        layer.lora_A["default"] = _linear(torch.cat([a, a0]))
        layer.lora_B["default"] = _linear(torch.cat([b, -b0], dim=1))
        layer.r["default"], layer.lora_alpha["default"] = 2 * len(a), 2 * layer.lora_alpha["default"]
    config = cast(LoraConfig, model.peft_config["default"])
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    delattr(model, _START)


def _layers(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _sides(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return side_a(layer, "default").weight, side_b(layer, "default").weight


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    return linear
