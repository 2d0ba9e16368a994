"""Run one arm in this process and print its result as one line of JSON; started by run.py, once for each arm."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from xfactor_peft.lowmem.imports import leave_out_bitsandbytes
from xfactor_peft.lowmem.memory import peak_rss, reset_peak

from .arms import BATCH, Arm

SET_SIZE = 90
"""Tokens of GPT-2's vocabulary that contain "X". Which ones they are makes no difference to memory or time."""


TOKENS = 50


def batches(length: int, vocab_size: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (BATCH, length), generator=generator)


@torch.no_grad()
def _next(model, ids: torch.Tensor, cache) -> tuple[torch.Tensor, object]:
    output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def decoding(model) -> Callable[[Iterator[torch.Tensor]], float]:
    """Greedy continuation of eight tokens with a key-value cache; a step is a token."""
    state = [torch.arange(8)[None], None]

    def step(_: Iterator[torch.Tensor]) -> float:
        state[:] = _next(model, *state)
        return 0.0

    return step


def run(arm: Arm, checkpoint: Path, steps: int) -> dict:
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    target = torch.zeros(vocab_size)
    target[:: vocab_size // SET_SIZE] = 1
    target /= target.sum()
    if arm.stack == "ours":
        leave_out_bitsandbytes()  # as the command line does for runs that it takes no part in
    stack = importlib.import_module(f".{arm.stack}", __package__)
    if arm.decode:
        step, steps = decoding(stack.load(arm, checkpoint)), TOKENS
    else:
        step = stack.prepare(arm, checkpoint, target)
    load_peak = peak_rss()
    reset_peak(torch.device("cpu"))
    inputs, losses, seconds = batches(arm.length, vocab_size), [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step(inputs))
        seconds.append(time.perf_counter() - started)
    return {"arm": asdict(arm), "load_peak": load_peak, "train_peak": peak_rss(), "losses": losses, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(run(Arm(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))))
