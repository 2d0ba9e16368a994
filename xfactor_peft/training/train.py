"""`train`: a base and a target in, a trained model with everything worth writing down out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.loading import Base
from ..budget.plan import Plan
from ..checkpoint.state import Step
from ..lora.wrap import matched_modules, trainable_parameters, unmatched_modules
from ..lowmem.memory import reset_peak
from ..objective.targets import Target
from ..options import EvalOptions, LoraOptions, MemoryOptions, ObjectiveOptions, Recipe, TrainOptions
from ..progress import phase
from ..sampling.metrics import Evaluation
from ..sampling.sampler import cache_limit
from ..sampling.warnings import collapse_warnings, rate_warnings
from .phases import phases_of
from .rate import RateReport
from .run import Hooks, TrainingRun


@dataclass
class TrainResult:
    """A trained model with everything that is worth writing down about how it came to be.

    `before` and `after` are None where no evaluation was asked for; `history` is empty where nothing was left to learn.
    """

    base: Base
    model: PeftModel | PreTrainedModel
    target: Target
    options: TrainOptions
    lora: LoraOptions | None
    before: Evaluation | None
    after: Evaluation | None
    history: list[Step]
    parameters: int
    modules: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, int] = field(default_factory=dict)
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
            "steps_made": len(self.history),
            "objective": self.objective.record(),
            "rate": self.rate.record() if self.rate else None,
            "warnings": self.warnings,
            "lora": asdict(self.lora) if self.lora else None,
            "loss": {"first": self.history[0].loss, "last": self.history[-1].loss} if self.history else None,
            "before": self.before.record() if self.before else None,
            "after": self.after.record() if self.after else None,
            "trainable_parameters": self.parameters,
            "target_modules": self.modules,
            "unmatched_modules": self.unmatched,
            "seconds": round(self.seconds, 3),
            "load_peak": self.base.load_peak,
            "train_peak": self.train_peak,
            "sampling_peak": self.sampling_peak,
            "recomputed_blocks": self.recomputed_blocks,
            "plan": self.plan.record() if self.plan else None,
        }


def train(
    base: Base,
    target: Target,
    options: TrainOptions = TrainOptions(),
    lora: LoraOptions | None = None,
    evaluation: EvalOptions | None = EvalOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    memory: MemoryOptions = MemoryOptions(),
    *,
    on_step: Callable[[Step], None] = lambda _: None,
) -> TrainResult:
    """Train `base` in place towards `target`, and measure R before and after.

    Minimises mean_t D_KL(P || Q_model(. | x_<=t)) over batches x of contexts (every position counts, inputs are not
    shifted), on LoRA adapters ("lora") or on all weights ("full"). P is the uniform target's, or the tilted base for a
    `TiltedTarget`, whose strength is solved for the wanted rate (see `rate`).

    Args:
        base: a loaded model; it is changed (wrapped, or trained), so load a new one for another run.
        lora: None means what the target suggests: rank 8 on attention and MLP, for a rate the set head (and both with
            `sequence_level`).
        evaluation: how R is measured; None leaves measuring out.
        memory: how many blocks are recomputed in backward (see `budget`).
        on_step: called after every step, for progress and logs.

    Raises:
        XFactorError: a quantised model with method "full", a sequence longer than the context, options that do not go
            together, a loss that is not finite, LoRA that did not move, or memory that ran out.
    """
    return train_recipe(base, target, Recipe(options, lora, evaluation, objective, memory), Hooks(on_step))


def train_recipe(
    base: Base,
    target: Target,
    recipe: Recipe,
    hooks: Hooks,
    on_trained: Callable[[TrainResult], None] = lambda _: None,
) -> TrainResult:
    """As `train`, with checkpoints where `hooks` has them.

    `on_trained` is called with the result before it is measured, so that nothing is lost from there on.

    Raises:
        Interrupted: a signal stopped a run that is saved.
    """
    if recipe.lora is None:
        recipe = replace(recipe, lora=target.default_lora(recipe.objective))
    run = TrainingRun.start(base, target, recipe, hooks)
    with_lora = recipe.train.method == "lora"
    modules = matched_modules(base.model, run.lora.target) if with_lora else {}
    unmatched = unmatched_modules(base.model, run.lora.target) if with_lora else {}
    torch.manual_seed(recipe.train.seed)
    with cache_limit(run.cache_bytes), run.heap():
        with phase("R before"):
            before, sampling_before = run.measure()
        phases = phases_of(run)
        reset_peak(base.device)
        started = time.perf_counter()
        with run.explaining_out_of_memory():
            for part in phases:
                part.run()
        run.model.eval()
        seconds, train_peak = time.perf_counter() - started, run.peaks()
        result = TrainResult(
            base=base,
            model=run.model,
            target=target,
            options=recipe.train,
            lora=recipe.lora if with_lora else None,
            before=before,
            after=None,
            history=run.history,
            parameters=trainable_parameters(run.model),
            modules=modules,
            unmatched=unmatched,
            seconds=max(seconds, sum(step.seconds for step in run.history)),  # an earlier part of the run included
            train_peak=train_peak,
            sampling_peak=sampling_before,
            recomputed_blocks=run.recomputed,
            objective=recipe.objective,
            rate=phases[-1].report(),
        )
        on_trained(result)
        with phase("R after"):
            result.after, sampling_after = run.measure()
        result.rate = phases[-1].measured(result.after)
    result.sampling_peak = {key: max(peak, sampling_after[key]) for key, peak in sampling_before.items()}
    result.warnings = _warnings(before, result.after, result.rate)
    return result


def _warnings(before: Evaluation | None, after: Evaluation | None, report: RateReport | None) -> list[str]:
    found = collapse_warnings(before, after) if before and after else []
    return found + (rate_warnings(report.wanted, after) if report and report.wanted and after else [])
