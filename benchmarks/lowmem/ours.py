"""This package, with the same recipe as the plain stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.lowmem.activations import prepare_for_training
from xfactor_peft.objective.kl import kl_loss
from xfactor_peft.options import LoadOptions, LoraOptions

from .arms import Arm


def load(arm: Arm, checkpoint: Path) -> torch.nn.Module:
    return load_base(resolve_model(str(checkpoint)), LoadOptions(arm.dtype, "cpu", arm.quantization)).model


def prepare(arm: Arm, checkpoint: Path, target: torch.Tensor) -> Callable[[Iterator[torch.Tensor]], float]:
    """A function that makes one training step on the next batch and returns its loss."""
    model = load(arm, checkpoint)
    prepare_for_training(model, arm.checkpointing)
    split_model = split(model)
    torch.manual_seed(0)
    model = add_lora(model, LoraOptions(r=8, alpha=16))
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    mask = target > 0

    def step(inputs: Iterator[torch.Tensor]) -> float:
        loss = kl_loss(split_model.hidden(next(inputs)), split_model.weight, target, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
