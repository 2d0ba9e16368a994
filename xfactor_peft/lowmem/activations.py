"""Fewer and smaller saved activations: a one-kernel GELU, and activation checkpointing for some or all blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import use_short_attention
from .peft_parts import unwrapped

if TYPE_CHECKING:
    from peft import PeftModel


class TanhGELU(nn.Module):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.

    One kernel that saves x and rounds once; transformers' `gelu_new` is a chain of seven that saves seven tensors.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def fuse_gelu(model: nn.Module) -> int:
    """Replace every `gelu_new` and `gelu_fast` of the model in place by `TanhGELU`; returns how many."""
    count = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(module, name, TanhGELU())
                count += 1
    return count


def prepare_for_training(model: PreTrainedModel | PeftModel, checkpointing: bool | int = False) -> None:
    """Make the model's activations small, in place; also through a PEFT wrapper, before or after it is made.

    Args:
        checkpointing: True recomputes every block in backward, an int n the first n blocks, False none. The
            non-reentrant kind is used, so LoRA in the blocks gets its gradients although the embeddings are frozen.

    Raises:
        ValueError: checkpointing is asked for and the model has no blocks that support it.
    """
    base = unwrapped(model)
    fuse_gelu(base)
    use_short_attention(base)
    blocks = checkpointed_blocks(base)
    if not checkpointing:
        _switch(base, False)
        return
    if not blocks:
        raise ValueError(f"{type(base).__name__} supports no activation checkpointing; use `checkpointing=off`")
    _switch(base, True)
    if checkpointing is not True:
        for block in blocks[checkpointing:]:
            block.gradient_checkpointing = False


def _switch(model: PreTrainedModel, on: bool) -> None:
    """What `activation_checkpointing_enable` does, whose name and warnings change between versions of transformers.

    The flag on the model itself keeps the key-value cache out of blocks that are run twice.
    """
    settings = {"_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False), "gradient_checkpointing": on}
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            for name, value in settings.items():
                setattr(module, name, value)


def checkpointed_blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The blocks that can be recomputed, in the order of the model; [] for a model without support."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
