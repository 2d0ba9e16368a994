"""Peaks and step times of one arm."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ..process import OnStep
from ..store import Record
from .arms import BATCH, Arm
from .stacks import STACKS

SET_SIZE = 90
"""Tokens of GPT-2's vocabulary that contain "X". Which ones they are makes no difference to memory or time."""
DECODED = 50


def measure(spec: Record, on_step: OnStep, checkpoint: str) -> Record:
    """{"load_peak", "train_peak": MiB, "losses", "seconds": of every step} of the arm `spec["arm"]`."""
    from xfactor_peft.lowmem.memory import peak_rss, reset_peak

    arm, losses, seconds = Arm(**spec["arm"]), [], []
    model = STACKS[arm.stack].load(arm, checkpoint)
    step = decoding(model) if arm.decode else training(arm, model)
    load_peak = peak_rss()
    reset_peak(torch.device("cpu"))
    for index in range(DECODED if arm.decode else spec["steps"]):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
        on_step(index + 1, losses[-1])
    return {"load_peak": load_peak, "train_peak": peak_rss(), "losses": losses, "seconds": seconds}


def training(arm: Arm, model: nn.Module) -> Callable[[], float]:
    """A function that makes one training step on the next random batch and returns its loss."""
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(0)
    target = torch.zeros(vocabulary)
    target[:: vocabulary // SET_SIZE] = 1
    model, loss_of = STACKS[arm.stack].prepare(arm, model, target / target.sum())
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-4, fused=arm.stack == "ours" or None)

    def step() -> float:
        loss = loss_of(torch.randint(vocabulary, (BATCH, arm.length), generator=generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def decoding(model: nn.Module) -> Callable[[], float]:
    """Greedy continuation of eight tokens with a key-value cache; a step is a token."""
    ids, cache = torch.arange(8)[None], None

    @torch.no_grad()
    def step() -> float:
        nonlocal ids, cache
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        return 0.0

    return step
