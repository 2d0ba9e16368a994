"""A training run in a folder, from its first line to the adapter in its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base.loading import Base
from ..budget.plan import Plan
from ..checkpoint.checkpointer import SAVE_EVERY, Checkpointer
from ..checkpoint.interruption import Interrupted, Interruption
from ..checkpoint.locks import folder_lock
from ..errors import XFactorError
from ..objective.targets import TiltedTarget, UniformTarget
from ..options import EvalOptions, LoraOptions, MemoryOptions, ObjectiveOptions, TrainOptions
from ..tokens.token_set import TokenSet
from ..training.parallel import own_output, process
from ..training.train import Step, TrainResult, default_lora, train
from .folder import RunFolder


def default_name(
    tokens: TokenSet, options: TrainOptions, lora: LoraOptions, target: UniformTarget | TiltedTarget | None = None
) -> str:
    """A folder name from the rule and the method, e.g. "X-lora-r8" or, for a rate, "X-rate-0.1-head"."""
    rule = tokens.rule
    value = rule.value if isinstance(rule.value, str) else ""
    plain = re.sub(r"[^\w-]+", "_", value, flags=re.ASCII).strip("_") or f"{rule.kind}-{tokens.hash[:8]}"
    method = f"{lora.variant.replace('+', '-plus')}-r{lora.r}" if options.method == "lora" else "full"
    if isinstance(target, TiltedTarget):
        goal = target.goals[0]
        wish = f"rate-{goal.rate:g}" if goal.rate is not None else f"lambda-{goal.strength:g}"
        several = f"-and-{len(target.goals) - 1}-more" if len(target.goals) > 1 else ""
        method = f"{wish}{several}-{lora.target.replace(',', '-')}"
    return f"{plain}{'-any-case' if rule.ignore_case else ''}-{method}"


def train_to_folder(
    base: Base,
    target: UniformTarget | TiltedTarget,
    output: Path,
    options: TrainOptions = TrainOptions(),
    lora: LoraOptions | None = None,
    evaluation: EvalOptions = EvalOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    memory: MemoryOptions = MemoryOptions(),
    *,
    plan: Plan | None = None,
    force: bool = False,
    resume: bool = False,
    save_every: int = SAVE_EVERY,
    settings: dict[str, Any] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """`train`, with its results in `output`; returns the result and the record written.

    While it runs, everything is in a hidden folder beside `output`, which takes its name when the run is done:
    `metrics.jsonl`, a first line with the model, the token set and the settings and then one line a step, and
    checkpoints (see `run_folder`). A run that was stopped, killed or lost its power goes on with `resume` and the same
    arguments, and ends with the same bytes on a CPU as if nothing had happened. With `fsdp` there are no checkpoints.

    Args:
        plan: what was predicted of the run, for the record.
        resume: go on from the newest whole checkpoint (from the start where there is none yet).
        save_every: steps between checkpoints; 0 saves at the end of training and when a signal comes only.
        settings: what a caller wants to find again in `settings.json` when it resumes.

    Raises:
        XFactorError: `output` exists and `force` is off, an interrupted run is there and neither `force` nor `resume`
            is on, other arguments than those of the run to resume, another run is writing there, or training fails.
        Interrupted: SIGINT or SIGTERM came; the message says how to go on.
    """
    lora = lora or default_lora(target, objective)
    header = {
        "base": base.record(),
        "tokens": target.tokens.record(),
        "train": options.record(),
        "lora": asdict(lora) if options.method == "lora" else None,
        "target": target.record(),
        "objective": objective.record(),
    }
    if resume and process()[1] > 1:
        raise XFactorError("--resume goes on in one process; start it without accelerate launch")
    with own_output(output) as output, folder_lock(output), Interruption() as interruption:
        folder = RunFolder.open(output, header, force=force, resume=resume, settings=settings)
        checkpointer = (
            None if options.fsdp else Checkpointer(folder.checkpoints, save_every, output, interruption, folder.start)
        )
        with folder.log() as log:

            def record_step(step: Step) -> None:
                log(step)
                if on_step:
                    on_step(step)

            try:
                result = train(
                    base,
                    target,
                    options,
                    lora,
                    evaluation,
                    objective,
                    memory,
                    on_step=record_step,
                    checkpointer=checkpointer,
                )
                result.plan = plan
                return result, folder.finish(result)
            except Interrupted as stopped:
                raise folder._with_resume_hint(stopped) from None
            except XFactorError:
                folder.discard_if_empty()
                raise
