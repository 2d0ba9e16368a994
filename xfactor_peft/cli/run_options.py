"""Options that decide a run's size, shared by `train` and `plan`, and what they stand for."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from ..options import (
    CHECKPOINTING,
    LORA_TARGETS,
    LORA_VARIANTS,
    METHODS,
    EvalOptions,
    LoraOptions,
    MemoryOptions,
    Recipe,
    SamplingOptions,
    TrainOptions,
)
from .common import Command, apply_options
from .rate import objective_options, target_kind

if TYPE_CHECKING:
    from ..base.resolve import ModelChoice
    from ..budget.plan import Plan
    from ..options import LoadOptions

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def run_options(function: Command) -> Command:
    """--method, --lora-*, --target, --batch-size, --grad-accum, --seq-len, --checkpointing, --memory-budget."""
    return apply_options(
        [
            click.option("--method", type=click.Choice(METHODS), default="lora", show_default=True,
                         help="full trains all weights."),
            click.option("--lora-r", default=8, show_default=True, help="Rank."),
            click.option("--lora-alpha", default=16, show_default=True, help="The update is scaled by alpha / r."),
            click.option("--lora-dropout", default=0.0, show_default=True, help="Share of LoRA's inputs set to 0."),
            click.option("--lora-variant", type=click.Choice(LORA_VARIANTS), default="lora", show_default=True,
                         help="What else LoRA may be; see docs/variants.md."),
            click.option("--target", type=click.Choice(LORA_TARGETS),
                         help="Which layers carry LoRA; head is the output term of a rate.  "
                         "[default: all; head for a rate; all,head with --sequence-level]"),
            click.option("--batch-size", default=4, show_default=True, help="Sequences in a micro-batch."),
            click.option("--grad-accum", default=1, show_default=True, help="Micro-batches in a step."),
            click.option("--auto-batch", is_flag=True,
                         help="Halve micro-batches that do not fit into memory; the step stays the same."),
            click.option("--seq-len", default=64, show_default=True, help="Tokens in a sequence."),
            click.option("--checkpointing", type=click.Choice(CHECKPOINTING), default="auto", show_default=True,
                         help="Recompute activations in backward; auto: in as few blocks as fit the budget."),
            click.option("--memory-budget", metavar="SIZE",
                         help="Most memory the run may take, e.g. 1GiB.  [default: what is free]"),
        ],
        function,
        "Size of the run",
    )  # fmt: skip


def make_recipe(flags: dict[str, Any]) -> Recipe:
    """Everything that the options of `train` and `plan` say about a run, its LoRA layers decided."""
    kind, objective = target_kind(flags), objective_options(flags)
    lora = LoraOptions(
        flags["lora_r"], flags["lora_alpha"], flags["lora_dropout"],
        flags["target"] or kind.default_lora(objective).target, flags["lora_variant"],
    )  # fmt: skip
    names = [field.name for field in fields(TrainOptions)]
    train = TrainOptions(**{name: flags[name] for name in names if name in flags})
    budget = parse_size(flags["memory_budget"]) if flags["memory_budget"] else None
    return Recipe(train, lora, _evaluation(flags), objective, MemoryOptions(flags["checkpointing"], budget))


def _evaluation(flags: dict[str, Any]) -> EvalOptions | None:
    if flags.get("no_eval"):
        return None
    decoding = {name: flags[name] for name in ("temperature", "top_k", "top_p")}
    sampling = SamplingOptions(seed=flags.get("seed", 0), **decoding)
    if flags.get("eval_tokens") is not None:
        sampling = replace(sampling, max_new_tokens=flags["eval_tokens"])
    options = EvalOptions(repeats=flags.get("eval_repeats", 4), sampling=sampling)
    if flags["prompts"] is None:
        return options
    from ..sampling.prompt_families import read_families

    own = [prompt for family in read_families(Path(flags["prompts"])) if not family.chat for prompt in family.prompts]
    return replace(options, prompts=tuple(own)) if own else options


def fitting_plan(
    flags: dict[str, Any], choice: ModelChoice, load: LoadOptions, recipe: Recipe, *, before: bool = True
) -> tuple[Plan, LoadOptions]:
    """`plan_run`; with weights mapped where the run would not fit otherwise and `load` leaves that open."""
    plan = plan_run(flags, choice, load, recipe, before=before)
    if plan.fits or load.weights != "auto" or choice.gguf or not plan.phases or recipe.train.method == "full":
        return plan, load
    mapped = replace(load, weights="mapped")
    other = plan_run(flags, choice, mapped, recipe, before=before)
    return (other, mapped) if other.fits else (plan, load)


def plan_run(
    flags: dict[str, Any], choice: ModelChoice, load: LoadOptions, recipe: Recipe, *, before: bool = True
) -> Plan:
    """Predict the run that these flags ask for; nothing but the model's configuration is read.

    `before` anything of the run was done, a block or two are also run to predict seconds a step; otherwise the process
    is taken to hold all that it does besides the model.

    Raises:
        XFactorError: this kind of run cannot be predicted.
    """
    from ..base.hardware import pick_device, pick_dtype, quantized_by
    from ..base.loading import check_gguf_options, check_mapped
    from ..budget.dry_run import Shape
    from ..budget.memory_model import resident
    from ..budget.phases import Course
    from ..budget.plan import make_plan
    from ..objective.targets import TiltedTarget

    if choice.gguf:
        check_gguf_options(load, choice.name)
    device = pick_device(load.device)
    mapped = load.weights == "mapped" and not choice.gguf
    if mapped:
        check_mapped(load, device, choice.name)
    if device.type == "cpu" and quantized_by(load, device) == "bitsandbytes":
        raise XFactorError("`backend=bitsandbytes` is not predicted on a CPU; drop it, or measure a short run")
    train, lora = recipe.train, recipe.lora
    assert lora is not None  # `make_recipe` decides it
    shape = Shape(
        dtype=pick_dtype(load.dtype, device),
        quantization="gguf" if choice.gguf else load.quantization,
        batch=train.batch_size,
        length=train.seq_len,
        method=train.method,
        lora=lora,
        sets=max(1, len(flags["goals"])) if lora.head else 0,
        teacher=target_kind(flags).needs_teacher(recipe.objective),
        packed=choice.gguf.stat().st_size if choice.gguf else 0,
        mapped=mapped,
    )
    course = Course.of(recipe, rate=target_kind(flags) is TiltedTarget)
    return make_plan(
        choice.gguf or choice.folder,
        shape,
        recipe.memory,
        grad_accum=train.grad_accum,
        device=device,
        time=before,
        course=course,
        baseline=None if before else resident(mapped=mapped),
    )


def parse_size(text: str) -> int:
    """Bytes from "1GiB", "900MiB", "1.5G" (decimal) or "512mb".

    Raises:
        XFactorError: it is no number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise XFactorError(f"--memory-budget {text!r} is not a size; write for example 1GiB or 900MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
