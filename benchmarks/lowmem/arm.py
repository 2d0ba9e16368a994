"""Run one arm in this process and print its result as one line of JSON; started by run.py, once for each arm."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from arms import BATCH, Arm

SET_SIZE = 90
"""Tokens of GPT-2's vocabulary that contain "X". Which ones they are makes no difference to memory or time."""


def batches(length: int, vocab_size: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (BATCH, length), generator=generator)


def run(arm: Arm, checkpoint: Path, steps: int) -> dict:
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    target = torch.zeros(vocab_size)
    target[:: vocab_size // SET_SIZE] = 1
    target /= target.sum()
    if arm.stack == "ours":
        from ours import prepare
    else:
        from plain import prepare
    step = prepare(arm, checkpoint, target)
    from xfactor_peft.memory import peak_rss, reset_peak

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
