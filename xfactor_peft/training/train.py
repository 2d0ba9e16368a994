"""The training loop: batches of contexts, a KL objective, Adam, on accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.loading import Base
from ..base.split_model import SplitModel, split
from ..budget.dry_run import Shape
from ..budget.out_of_memory import OUT_OF_MEMORY, explain, is_out_of_memory
from ..budget.plan import Plan, recompute_in
from ..errors import XFactorError
from ..lora.variants import finish_variant
from ..lora.wrap import adapter_off, add_lora, matched_modules, trainable_parameters
from ..lowmem import prepare_for_training
from ..lowmem.memory import peaks, reset_peak
from ..objective.objectives import UniformObjective
from ..objective.targets import TiltedTarget, UniformTarget
from ..options import EvalOptions, LoraOptions, MemoryOptions, ObjectiveOptions, TrainOptions
from ..sampling.contexts import batches, check_length
from ..sampling.metrics import Evaluation, collapse_warnings, evaluate
from .loop import Step, optimise
from .sharding import ShardedCopy

if TYPE_CHECKING:
    from ..checkpoint.checkpointer import Checkpointer
    from .rate_run import RateReport, RateRun


@dataclass
class TrainResult:
    """A trained model with everything that is worth writing down about how it came to be."""

    base: Base
    model: PeftModel | PreTrainedModel
    target: UniformTarget | TiltedTarget
    options: TrainOptions
    lora: LoraOptions | None
    before: Evaluation
    after: Evaluation
    history: list[Step]
    parameters: int
    modules: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    train_peak: dict[str, float] = field(default_factory=dict)
    sampling_peak: dict[str, float] = field(default_factory=dict)
    recomputed_blocks: int = 0
    plan: Plan | None = None
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rate: RateReport | None = None
    warnings: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Everything but the weights, JSON-serialisable."""
        return {
            "base": self.base.record(),
            "tokens": self.target.tokens.record(),
            "target": self.target.record(),
            "train": self.options.record(),
            "objective": self.objective.record(),
            "rate": self.rate.record() if self.rate else None,
            "warnings": self.warnings,
            "lora": asdict(self.lora) if self.lora else None,
            "loss": {"first": self.history[0].loss, "last": self.history[-1].loss},
            "before": self.before.record(),
            "after": self.after.record(),
            "trainable_parameters": self.parameters,
            "target_modules": self.modules,
            "seconds": round(self.seconds, 3),
            "load_peak": self.base.load_peak,
            "train_peak": self.train_peak,
            "sampling_peak": self.sampling_peak,
            "recomputed_blocks": self.recomputed_blocks,
            "plan": self.plan.record() if self.plan else None,
        }


def train(
    base: Base,
    target: UniformTarget | TiltedTarget,
    options: TrainOptions = TrainOptions(),
    lora: LoraOptions | None = None,
    evaluation: EvalOptions = EvalOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    memory: MemoryOptions = MemoryOptions(),
    *,
    on_step: Callable[[Step], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> TrainResult:
    """Train `base` in place towards `target`, and measure R before and after.

    Minimises mean_t D_KL(P || Q_model(. | x_<=t)) over batches x of contexts (every position counts, inputs are not
    shifted), on LoRA adapters ("lora") or on all weights ("full"). P is the uniform target's, or the tilted base for a
    `TiltedTarget`, whose strength is solved for the wanted rate (see `rate_training`).

    Args:
        base: a loaded model; it is changed (wrapped, or trained), so load a new one for another run.
        memory: how many blocks are recomputed in backward (see `budget`).
        lora: None means rank 8 on attention and MLP, for a rate the set head (and both with `sequence_level`).
        on_step: called after every step, for progress and logs.
        checkpointer: saves the run as it goes, and goes on from where it was saved (`train_to_folder` makes one).

    Raises:
        XFactorError: a quantised model with method "full", a sequence longer than the context, options that do not go
            together, a loss that is not finite, LoRA that did not move, or memory that ran out.
        Interrupted: a signal stopped a run that has a checkpointer.
    """
    from .rate import train_rate

    lora = lora or default_lora(target, objective)
    _check(base, options, target, lora, objective)
    shape, teacher = run_shape(base, target, options, lora), needs_teacher(target, objective)
    recomputed = recompute_in(base, shape, memory, teacher=teacher)
    if checkpointer:
        recomputed = checkpointer.recorded("recomputed", recomputed)
    prepare_for_training(base.model, recomputed)
    reset_peak(base.device)
    torch.manual_seed(options.seed)
    split_model = split(base.model)
    goals = [goal.tokens for goal in target.goals] if isinstance(target, TiltedTarget) and len(target.goals) > 1 else []
    before = evaluate(split_model, base.tokenizer, target.tokens, evaluation, goals=goals)
    sampling = [peaks(base.device)]
    modules = matched_modules(base.model, lora.target) if options.method == "lora" else {}
    run: RateRun | None = None
    model: PeftModel | PreTrainedModel
    try:
        if isinstance(target, TiltedTarget):
            run = train_rate(base, split_model, target, options, lora, objective, on_step, checkpointer)
            model, history, seconds, peak = run.model, run.history, run.seconds, run.peak
        else:
            model, history, seconds, peak = _train_uniform(
                base, split_model, target, options, lora, objective, on_step, checkpointer
            )
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        resume_hint = checkpointer.resume_hint() if checkpointer else ""
        reason = explain(base, shape, options.grad_accum, teacher=teacher, error=error, resume_hint=resume_hint)
        raise XFactorError(reason) from None  # the traceback would hold on to the memory
    off = partial(adapter_off, model) if isinstance(model, PeftModel) else None
    reset_peak(base.device)
    after = evaluate(split_model, base.tokenizer, target.tokens, evaluation, adapter_off=off, goals=goals)
    sampling.append(peaks(base.device))
    return TrainResult(
        base=base,
        model=model,
        target=target,
        options=options,
        lora=lora if options.method == "lora" else None,
        before=before,
        after=after,
        history=history,
        parameters=trainable_parameters(model),
        modules=modules,
        seconds=seconds,
        train_peak=peak,
        sampling_peak={key: max(part[key] for part in sampling) for key in sampling[0]},
        recomputed_blocks=recomputed,
        objective=objective,
        rate=run.report(evaluation, after) if run else None,
        warnings=collapse_warnings(before, after),
    )


def _train_uniform(
    base: Base,
    split_model: SplitModel,
    target: UniformTarget,
    options: TrainOptions,
    lora: LoraOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None,
    checkpointer: Checkpointer | None,
) -> tuple[PeftModel | PreTrainedModel, list[Step], float, dict[str, float]]:
    """(model, history, seconds, peak), the seconds of an earlier part of the run included."""
    model = add_lora(base.model, lora) if options.method == "lora" else base.model.requires_grad_(True)
    off = partial(adapter_off, model) if isinstance(model, PeftModel) else None
    sharded = ShardedCopy(base.model) if options.fsdp else None
    trained = SplitModel(sharded.model) if sharded else split_model
    module = UniformObjective(trained, target, objective.kl_to_base, off)
    inputs = batches(base, target.contexts(objective), options.batch_size, options.seq_len, seed=options.seed)
    reset_peak(base.device)
    history = optimise(base, model, module, inputs, options, on_step, checkpointer=checkpointer, sharded=sharded)
    finish_variant(model)
    return model, history, sum(step.seconds for step in history), peaks(base.device)


def default_lora(target: UniformTarget | TiltedTarget, objective: ObjectiveOptions) -> LoraOptions:
    """Attention and MLP for the uniform target. A rate needs the set head, planning the blocks besides."""
    if isinstance(target, UniformTarget):
        return LoraOptions()
    return LoraOptions(target="all,head" if objective.sequence_level else "head")


def needs_teacher(target: UniformTarget | TiltedTarget, objective: ObjectiveOptions) -> bool:
    """Whether a step holds the base's states beside the model's."""
    return isinstance(target, TiltedTarget) or objective.kl_to_base > 0


def run_shape(base: Base, target: UniformTarget | TiltedTarget, options: TrainOptions, lora: LoraOptions) -> Shape:
    """What decides this run's memory, for `budget`."""
    sets = len(target.goals) if lora.head and isinstance(target, TiltedTarget) else 0
    return Shape(base.dtype, base.quantization, options.batch_size, options.seq_len, options.method, lora, sets)


def _check(
    base: Base,
    options: TrainOptions,
    target: UniformTarget | TiltedTarget,
    lora: LoraOptions,
    objective: ObjectiveOptions,
) -> None:
    target.check(objective)
    if options.method == "full" and base.quantized:
        raise XFactorError("--method full cannot train a quantised model; drop --load-in-8bit / --load-in-4bit")
    if options.method == "full" and (isinstance(target, TiltedTarget) or objective.kl_to_base):
        raise XFactorError("--method full has no base left to compare with; a rate and --kl-to-base need --method lora")
    if isinstance(target, UniformTarget) and lora.head:
        raise XFactorError(f"--target {lora.target} needs a rate: give --target-rate, --lambda or --goal")
    check_length(base.model.config, options.seq_len)
