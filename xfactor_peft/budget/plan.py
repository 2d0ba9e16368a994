"""A plan: predicted memory and time of a run, whether it fits, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..base.loading import Base
from ..errors import XFactorError
from ..lowmem.memory import mib
from ..options import MemoryOptions
from ..sampling.contexts import check_length
from .dry_run import Shape, StepMemory, measure_step, read_config
from .memory_model import Prediction, blocks_to_recompute, free_memory, predict, resident
from .time_probe import probe


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take.

    Attributes:
        memory: predicted peak, bytes, part by part.
        budget: bytes it may take in all: `memory.budget`, or what the process has and the machine has free.
        recomputed: checkpointed blocks, of `blocks`.
        seconds: a step; None when it was not measured.
        advice: settings that would make it fit, with their predicted peak in bytes; empty when it fits.
    """

    memory: Prediction
    budget: int
    recomputed: int
    blocks: int
    seconds: float | None
    advice: tuple[tuple[str, int], ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.budget

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.memory.total, "fits": self.fits}


def make_plan(
    source: Path,
    shape: Shape,
    options: MemoryOptions = MemoryOptions(),
    *,
    grad_accum: int = 1,
    device: torch.device = torch.device("cpu"),
    time: bool = True,
) -> Plan:
    """Predict a run on the model in a folder or a GGUF file, of which only the configuration is read.

    Args:
        time: also run a block or two to predict seconds a step; on a CPU, and without a teacher, only.

    Raises:
        XFactorError: the configuration cannot be planned with.
    """
    config = read_config(source)
    check_length(config, shape.length)
    step = measure_step(config, shape)
    if shape.quantization == "gguf":
        step = replace(step, weights=source.stat().st_size)
    baseline = resident() if device.type == "cpu" else 0
    budget = options.budget or baseline + free_memory(device)
    count = chosen_blocks(step, shape, options, budget, baseline=baseline)
    memory = predict(step, shape, count, baseline=baseline)
    advice = () if memory.total <= budget else tuple(_advice(config, shape, grad_accum, budget, baseline))
    seconds = None
    if time and device.type == "cpu" and not shape.teacher and shape.quantization != "gguf":
        seconds = probe(config, shape, recompute=count > 0).step(len(step.blocks), count, grad_accum)
    return Plan(memory, budget, count, len(step.blocks), seconds, advice)


def chosen_blocks(step: StepMemory, shape: Shape, options: MemoryOptions, budget: int, *, baseline: int) -> int:
    """How many blocks `checkpointing` recomputes; with "auto" all of them when no number is enough."""
    if isinstance(options.checkpointing, int):
        return options.checkpointing
    if options.checkpointing != "auto":
        return len(step.blocks) if options.checkpointing == "on" else 0
    count = blocks_to_recompute(step, shape, budget, baseline=baseline)
    return len(step.blocks) if count is None else count


def recompute_in(base: Base, shape: Shape, options: MemoryOptions) -> int:
    """How many blocks of a loaded base to recompute.

    Raises:
        XFactorError: "auto" has a budget, and the model cannot be planned with.
    """
    if options.checkpointing == "off":
        return 0
    if isinstance(options.checkpointing, int):
        return options.checkpointing
    try:
        step = measure_step(base.model.config, shape)
        if shape.quantization == "gguf":
            step = replace(step, weights=sum(p.numel() * p.element_size() for p in base.model.parameters()))
    except XFactorError:
        if options.checkpointing == "auto" and options.budget is None:
            return 0
        raise
    baseline = max(1, resident() - step.weights) if base.device.type == "cpu" else 0
    budget = options.budget or resident() + free_memory(base.device)
    return chosen_blocks(step, shape, options, budget, baseline=baseline)


def _advice(
    config: PretrainedConfig, shape: Shape, grad_accum: int, budget: int, baseline: int
) -> Iterator[tuple[str, int]]:
    """Changes of settings that fit, the mildest first, at most three; with none, the smallest there is."""
    found, smallest = 0, ("", 1 << 62)
    for settings, changed in _candidates(shape, grad_accum):
        step = measure_step(config, changed)
        total = predict(step, changed, len(step.blocks), baseline=baseline).total
        smallest = min(smallest, (settings, total), key=lambda pair: pair[1])
        if total <= budget:
            yield settings, total
            found += 1
        if found == 3:
            return
    if not found:
        yield smallest


def _candidates(shape: Shape, grad_accum: int) -> Iterator[tuple[str, Shape]]:
    """(settings, shape) with every block recomputed: as asked, quantised, with micro-batches, shorter."""
    lora = replace(shape, method="lora")
    settings = "`checkpointing=on`" if shape.method == "lora" else "`method=lora` `checkpointing=on`"
    yield settings, lora
    start, kind = settings, shape.quantization
    for smaller in ("int8", "nf4") if kind is None else ("nf4",) if kind == "int8" else ():
        settings, kind = f"{start} `quantization={smaller}`", smaller
        yield settings, replace(lora, quantization=kind)
    batch = shape.batch
    while batch > 1:
        batch //= 2
        accumulation = -(-shape.batch * grad_accum // batch)
        changed = replace(lora, quantization=kind, batch=batch)
        yield f"{settings} `batch_size={batch}` `grad_accum={accumulation}`", changed
    if shape.length > 64:
        changed = replace(lora, quantization=kind, batch=1, length=64)
        yield f"{settings} `batch_size=1` `grad_accum={shape.batch * grad_accum}` `seq_len=64`", changed


def require_fit(plan: Plan) -> None:
    """Raises XFactorError, with the settings that would help, for a plan that does not fit its budget."""
    if plan.fits:
        return
    best = "; ".join(f"{settings} (about {mib(total)})" for settings, total in plan.advice)
    enough = any(total <= plan.budget for _, total in plan.advice)
    hint = f"these settings would fit: {best}" if enough else f"the smallest that this model can do is {best}"
    raise XFactorError(
        f"the run needs about {mib(plan.memory.total)}, more than the {mib(plan.budget)} allowed; {hint}"
    )
