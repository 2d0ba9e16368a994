"""A plan: predicted memory and time of a run, whether it fits, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig

from ..base.gguf_tokenizer import open_gguf, tokenizer_of
from ..base.loading import Base
from ..errors import XFactorError
from ..lowmem.allocator import give_back_pages
from ..lowmem.gguf_layers import read_pages
from ..lowmem.memory import mib
from ..options import MemoryOptions
from ..sampling.contexts import check_length
from .dry_run import Shape, StepMemory, measure_step, read_config
from .memory_model import PAGES, Prediction, blocks_to_recompute, file_pages, free_memory, predict, resident
from .phases import Course, Phase, predict_phases
from .time_probe import probe


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take.

    Attributes:
        memory: predicted peak of training, bytes, part by part.
        budget: bytes it may take in all: `memory.budget`, or what the process has and the machine has free.
        recomputed: checkpointed blocks, of `blocks`.
        seconds: a step; None when it was not measured.
        advice: settings that would make it fit, with their predicted peak in bytes; empty when it fits.
        phases: the predicted peak of every phase, in order; on CUDA none but training.
        reclaimable: bytes of mapped weights and code that come on top where memory is free, and that the system may
            take back.
    """

    memory: Prediction
    budget: int
    recomputed: int
    blocks: int
    seconds: float | None
    advice: tuple[tuple[str, int], ...] = ()
    phases: tuple[Phase, ...] = ()
    reclaimable: int = 0

    @property
    def highest(self) -> Phase:
        """The phase that decides the run's peak."""
        return max(self.phases, key=lambda phase: phase.total, default=Phase("training", self.memory.total))

    @property
    def total(self) -> int:
        """The run's peak, bytes."""
        return self.highest.total

    @property
    def fits(self) -> bool:
        return self.total <= self.budget

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "highest": self.highest.name, "fits": self.fits}


def make_plan(
    folder: Path,
    shape: Shape,
    options: MemoryOptions = MemoryOptions(),
    *,
    grad_accum: int = 1,
    device: torch.device = torch.device("cpu"),
    time: bool = True,
    course: Course = Course(),
    baseline: int | None = None,
) -> Plan:
    """Predict a run on the model in `folder`, or a GGUF file, of which only the configuration is read.

    Args:
        time: also run a block or two to predict seconds a step; on a CPU, and without a teacher, only.
        course: what the run does beside its steps.
        baseline: bytes of the process without the model, as `resident` counts them; by default its own size now, with
            the tokenizer read.

    Raises:
        XFactorError: the configuration cannot be planned with.
    """
    config = read_config(folder)
    check_length(config, shape.length)
    subject = _Subject(config, shape, course)
    if device.type != "cpu":
        baseline = 0
    elif baseline is None:
        baseline = _process(folder, mapped=shape.mapped)
    if shape.packed and baseline:
        baseline += LOADED
    budget = options.budget or baseline + free_memory(device)
    count = subject.blocks(options, budget, baseline)
    memory, phases = subject.predicted(count, baseline, limit_of(options, shape.packed))
    reclaimable = subject.step.mapped + file_pages() - PAGES if shape.mapped else 0
    plan = Plan(memory, budget, count, len(subject.step.blocks), None, (), phases, reclaimable)
    if not plan.fits:
        plan = replace(plan, advice=tuple(_advice(subject, grad_accum, budget, baseline)))
    if time and device.type == "cpu" and not shape.teacher and not shape.packed:
        seconds = probe(config, shape, recompute=count > 0).step(len(subject.step.blocks), count, grad_accum)
        plan = replace(plan, seconds=seconds)
    return plan


@dataclass
class _Subject:
    """What is planned: a model's configuration, a shape and the course of the run, with the dry runs of both."""

    config: PretrainedConfig
    shape: Shape
    course: Course

    def __post_init__(self) -> None:
        self.step = measure_step(self.config, self.shape)
        whole = self.course.texts_shape(self.shape)
        self.texts_step = measure_step(self.config, whole) if self.course.sequences else None

    def blocks(self, options: MemoryOptions, budget: int, baseline: int) -> int:
        """How many blocks `checkpointing` recomputes, so that steps and batches of whole texts fit."""
        count = chosen_blocks(self.step, self.shape, options, budget, baseline=baseline)
        if self.texts_step is None:
            return count
        whole = self.course.texts_shape(self.shape)
        return max(count, chosen_blocks(self.texts_step, whole, options, budget, baseline=baseline))

    def predicted(self, count: int, baseline: int, limit: int | None) -> tuple[Prediction, tuple[Phase, ...]]:
        """Training's peak in parts, and that of every phase; of training alone where the process's own is 0."""
        memory = predict(self.step, self.shape, count, baseline=baseline)
        if not baseline:
            return memory, ()
        return memory, predict_phases(
            self.config, self.step, self.shape, self.course, count,
            baseline=baseline, limit=limit, texts_step=self.texts_step,
        )  # fmt: skip


def _process(folder: Path, *, mapped: bool) -> int:
    """Bytes of this process with the tokenizer, which is read for it, and without the model."""
    try:
        gguf = folder.suffix == ".gguf"
        tokenizer = (
            tokenizer_of(open_gguf(folder)) if gguf else AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        )
    except (OSError, ValueError, KeyError):
        return resident(mapped=mapped)  # loading the model will say what is wrong with it
    give_back_pages()
    size = resident(mapped=mapped)
    del tokenizer
    return size


LOADED = 28 * 2**20
"""What a dry run and loading a packed file leave in the process beside the file: code pages, Python's objects."""
PACKED_RUN = 550 * 2**20
"""What a run on a GGUF file takes beside 1.1 times the file, where nothing else is asked for: who has such a file is
short of memory, so blocks are recomputed down to it."""


def limit_of(options: MemoryOptions, packed: int) -> int | None:
    """What the process is to stay below: the budget, else what a file of `packed` bytes promises; None without both."""
    return options.budget or (int(1.1 * packed) + PACKED_RUN if packed else None)


def chosen_blocks(step: StepMemory, shape: Shape, options: MemoryOptions, budget: int, *, baseline: int) -> int:
    """How many blocks `checkpointing` recomputes; with "auto" all of them when no number is enough."""
    if isinstance(options.checkpointing, int):
        return options.checkpointing
    if options.checkpointing != "auto":
        return len(step.blocks) if options.checkpointing == "on" else 0
    budget = min(budget, limit_of(options, shape.packed) or budget)
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
    except XFactorError:
        if options.checkpointing == "auto" and options.budget is None:
            return 0
        raise
    if shape.packed:  # pages that were not read yet are not among what is held, and would be missed
        read_pages(base.model)
    held = resident(mapped=shape.mapped)
    baseline = max(1, held - step.weights) if base.device.type == "cpu" else 0
    budget = options.budget or held + free_memory(base.device)
    return chosen_blocks(step, shape, options, budget, baseline=baseline)


def _advice(subject: _Subject, grad_accum: int, budget: int, baseline: int) -> Iterator[tuple[str, int]]:
    """Changes of settings that fit, the mildest first, at most three; with none, the smallest there is."""
    found, smallest = 0, ("", 1 << 62)
    for settings, changed in _candidates(subject.shape, grad_accum):
        other = _Subject(subject.config, changed, subject.course)
        memory, phases = other.predicted(len(other.step.blocks), baseline, budget)
        total = max((phase.total for phase in phases), default=memory.total)
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
        f"the run needs about {mib(plan.total)} ({plan.highest.name}), more than the {mib(plan.budget)} allowed; {hint}"
    )
