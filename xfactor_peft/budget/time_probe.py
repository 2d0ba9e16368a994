"""Seconds of a training step, from models of one and of two blocks that are really run.

    step(L) = rest + (L - k) block + k recomputed block,    block = t(2) - t(1),    rest = t(1) - block

Everything counts as it runs in training: quantised products, LoRA, the loss over the whole vocabulary, the optimiser.
A number of floating-point operations over a rate of the machine would miss most of that.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from ..base.split_model import SplitModel
from ..lowmem.activations import prepare_for_training
from ..lowmem.allocator import reuse_pages
from ..lowmem.peft_parts import unwrapped
from ..lowmem.quantized import QuantizedLinear
from ..lowmem.scratch import release_scratch
from ..objective.kl import kl_loss
from .dry_run import Shape, build

POSITIONS = 1024
REPEATS, SECONDS = 5, 2.0
"""At least two timed steps, at most `REPEATS`, fewer once they took `SECONDS`; the fastest counts."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one forward and backward pass of a micro-batch through a block, a recomputed block, and the rest."""

    block: float
    recomputed: float
    rest: float

    def step(self, blocks: int, recomputed: int, grad_accum: int = 1) -> float:
        return grad_accum * (self.rest + (blocks - recomputed) * self.block + recomputed * self.recomputed)


def probe(config: PretrainedConfig, shape: Shape, *, recompute: bool) -> StepTime:
    """Time short models of this shape on the CPU; `recompute` says whether recomputed blocks are of interest.

    Batches of more than `POSITIONS` are cut down and the time scaled up: at that size it is proportional to them.
    """
    batch = min(shape.batch, max(1, POSITIONS // shape.length))
    small, scale = replace(shape, batch=batch), shape.batch / batch
    one, two = _seconds(config, small, 1, False), _seconds(config, small, 2, False)
    block = max(two - one, 1e-6)
    recomputed = block + max(_seconds(config, small, 2, True) - two, 0.0) / 2 if recompute else block
    return StepTime(scale * block, scale * recomputed, scale * max(one - block, 0.0))


def _seconds(config: PretrainedConfig, shape: Shape, layers: int, checkpointing: bool) -> float:
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    model = build(short, shape, "cpu")
    _fill(model)
    prepare_for_training(model, checkpointing)
    reuse_pages()
    split_model = SplitModel(unwrapped(model))
    vocab_size = len(split_model.weight)
    target, mask = torch.full((vocab_size,), 1 / vocab_size), torch.zeros(vocab_size, dtype=torch.bool)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.0, fused=True)
    times: list[float] = []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=shape.method == "full" and shape.dtype == "bf16")
    while len(times) < 3 or (len(times) <= REPEATS and sum(times[1:]) < SECONDS):
        ids = torch.randint(vocab_size, (shape.batch, shape.length))
        started = time.perf_counter()
        with autocast:
            loss = kl_loss(split_model.hidden(ids), split_model.weight, target, mask, bias=split_model.bias).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    release_scratch()
    return min(times[1:])  # the first compiles kernels


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Values of the usual size in everything that the constructor left empty."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight, scales = module.codes()
            weight.random_(-100, 101) if weight.dtype == torch.int8 else weight.random_(0, 256)
            scales.fill_(0.05)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name and tensor.is_floating_point() and not name.endswith(("SCB", "absmax")):
            tensor.uniform_(-0.05, 0.05)
