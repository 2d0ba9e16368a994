"""Options that decide a run's size, shared by `train` and `plan`, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import Command, apply_options

if TYPE_CHECKING:
    from ..base.loading import LoadOptions
    from ..base.resolve import ModelChoice
    from ..budget.options import MemoryOptions
    from ..budget.plan import Plan
    from ..lora.wrap import LoraOptions

VARIANTS = ["lora", "dora", "rslora", "pissa", "lora+"]
TARGETS = ["attention", "mlp", "all", "head", "attention,head", "mlp,head", "all,head"]


def run_options(function: Command) -> Command:
    """--method, --lora-*, --target, --batch-size, --grad-accum, --seq-len, --checkpointing, --memory-budget."""
    return apply_options(
        [
            click.option("--method", type=click.Choice(["lora", "full"]), default="lora", show_default=True),
            click.option("--lora-r", default=8, show_default=True, help="Rank."),
            click.option("--lora-alpha", default=16, show_default=True, help="The update is scaled by alpha / r."),
            click.option("--lora-dropout", default=0.0, show_default=True),
            click.option("--lora-variant", type=click.Choice(VARIANTS), default="lora", show_default=True),
            click.option("--target", type=click.Choice(TARGETS),
                         help="Which layers carry LoRA; head is the output term of a rate.  "
                         "[default: all; head for a rate; all,head with --sequence-level]"),
            click.option("--batch-size", default=4, show_default=True, help="Sequences in a micro-batch."),
            click.option("--grad-accum", default=1, show_default=True, help="Micro-batches in a step."),
            click.option("--auto-batch", is_flag=True,
                         help="Halve micro-batches that do not fit into memory; the step stays the same."),
            click.option("--seq-len", default=64, show_default=True, help="Tokens in a sequence."),
            click.option("--checkpointing", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                         help="Recompute activations in backward; auto: in as few blocks as fit the budget."),
            click.option("--memory-budget", metavar="SIZE",
                         help="Most memory the run may take, e.g. 1GiB.  [default: what is free]"),
        ],
        function,
    )  # fmt: skip


def lora_options(flags: dict[str, Any]) -> LoraOptions:
    """The LoRA options as given; the target still open when it was not."""
    from ..lora.wrap import LoraOptions

    return LoraOptions(
        flags["lora_r"], flags["lora_alpha"], flags["lora_dropout"], flags["target"] or "all", flags["lora_variant"]
    )


def memory_options(flags: dict[str, Any]) -> MemoryOptions:
    from ..budget.options import MemoryOptions, parse_size

    budget = parse_size(flags["memory_budget"]) if flags["memory_budget"] else None
    return MemoryOptions(flags["checkpointing"], budget)


def plan_run(flags: dict[str, Any], choice: ModelChoice, load: LoadOptions) -> Plan:
    """Predict the run that these flags ask for; nothing but the model's configuration is read.

    Raises:
        XFactorError: this kind of run cannot be predicted.
    """
    from dataclasses import replace

    from ..base.loading import pick_device, pick_dtype, quantized_by
    from ..budget.dry_run import Shape
    from ..budget.plan import make_plan
    from ..errors import XFactorError

    device = pick_device(load.device)
    if device.type == "cpu" and quantized_by(load, device) == "bitsandbytes":
        raise XFactorError("--quant-backend bitsandbytes is not predicted on a CPU; drop it, or measure a short run")
    rate = flags["target_rate"] is not None or flags["strength"] is not None or bool(flags["goals"])
    lora = lora_options(flags)
    if rate and not flags["target"]:
        lora = replace(lora, target="all,head" if flags["sequence_level"] else "head")
    shape = Shape(
        dtype=pick_dtype(load.dtype, device),
        quantization=load.quantization,
        batch=flags["batch_size"],
        length=flags["seq_len"],
        method=flags["method"],
        lora=lora,
        sets=max(1, len(flags["goals"])) if lora.head else 0,
    )
    return make_plan(
        choice.folder, shape, memory_options(flags), grad_accum=flags["grad_accum"],
        teacher=rate or flags["kl_to_base"] > 0, device=device,
    )  # fmt: skip
