"""A training run in a folder, from its first line to the adapter in its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..base.loading import Base
from ..budget.plan import Plan
from ..checkpoint.checkpointer import SAVE_EVERY, Checkpointer, NoCheckpoints
from ..checkpoint.interruption import Interrupted, Interruption
from ..checkpoint.locks import folder_lock
from ..checkpoint.state import Step
from ..errors import XFactorError
from ..objective.targets import Target
from ..options import LoraOptions, Recipe, TrainOptions
from ..training.parallel import own_output, process
from ..training.run import Hooks
from ..training.train import TrainResult, train_recipe
from .folder import RunFolder


@dataclass(frozen=True)
class FolderOptions:
    """How a run treats its folder.

    Attributes:
        force: replace a finished or an interrupted run.
        resume: continue from the newest whole checkpoint (from the start where there is none yet).
        save_every: steps between checkpoints; 0 saves only at the end of training and when a signal comes.
        settings: what a caller wants to find again in `settings.json` when it resumes.
    """

    force: bool = False
    resume: bool = False
    save_every: int = SAVE_EVERY
    settings: dict[str, Any] = field(default_factory=dict)


def default_name(target: Target, options: TrainOptions, lora: LoraOptions) -> str:
    """A folder name from the rule and the method, e.g. "X-lora-r8" or, for a rate, "X-rate-0.1-head"."""
    tokens, rule = target.tokens, target.tokens.rule
    value = rule.value if isinstance(rule.value, str) else ""
    plain = re.sub(r"[^\w-]+", "_", value, flags=re.ASCII).strip("_") or f"{rule.kind}-{tokens.hash[:8]}"
    method = f"{lora.variant.replace('+', '-plus')}-r{lora.r}" if options.method == "lora" else "full"
    if target.goals:
        goal = target.goals[0]
        wanted = f"rate-{goal.rate:g}" if goal.rate is not None else f"lambda-{goal.strength:g}"
        several = f"-and-{len(target.goals) - 1}-more" if len(target.goals) > 1 else ""
        method = f"{wanted}{several}-{lora.target.replace(',', '-')}"
    return f"{plain}{'-any-case' if rule.ignore_case else ''}-{method}"


def train_to_folder(
    base: Base,
    target: Target,
    output: Path,
    recipe: Recipe = Recipe(),
    folder: FolderOptions = FolderOptions(),
    *,
    plan: Plan | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> tuple[TrainResult, dict[str, Any]]:
    """`train`, with its results in `output`; returns the result and the record written.

    While it trains, everything is in a hidden folder beside `output`: `metrics.jsonl`, a first line with the model, the
    token set and the settings and then one line a step, and checkpoints (see `folder`). It takes the name `output` with
    the trained adapter; R after training is measured then, and completes the record. A run that was stopped, killed or
    lost its power resumes with the same arguments, and ends with the same bytes on a CPU as if nothing had happened.
    With `fsdp` there are no checkpoints.

    Args:
        plan: what was predicted of the run, for the record.

    Raises:
        XFactorError: `output` exists and `force` is off, an interrupted run is there and neither `force` nor `resume`
            is on, other arguments than those of the run to resume, another run is writing there, or training fails.
        Interrupted: SIGINT or SIGTERM came; the message says how to resume.
    """
    lora = recipe.lora or target.default_lora(recipe.objective)
    header = _header(base, target, recipe, lora)
    if folder.resume and process()[1] > 1:
        raise XFactorError("`resume` works in one process; start it without accelerate launch")
    with own_output(output) as output, folder_lock(output), Interruption() as interruption:
        place = RunFolder.open(output, header, force=folder.force, resume=folder.resume, settings=folder.settings)
        checkpointer = NoCheckpoints()
        if not recipe.train.fsdp:
            checkpointer = Checkpointer(place.checkpoints, folder.save_every, interruption, place.start)
        with place.log() as log:

            def record_step(step: Step) -> None:
                log(step)
                on_step(step)

            def publish(result: TrainResult) -> None:
                result.plan = plan
                place.publish(result)

            try:
                hooks = Hooks(record_step, checkpointer)
                result = train_recipe(base, target, replace(recipe, lora=lora), hooks, publish)
                return result, place.complete(result)
            except Interrupted as stopped:
                raise place.with_resume_hint(stopped) from None
            except XFactorError as error:
                place.discard_if_empty(error)
                raise


def _header(base: Base, target: Target, recipe: Recipe, lora: LoraOptions) -> dict[str, Any]:
    """What a run is, for its log; a resumed one must say the same."""
    return {
        "base": base.record(),
        "tokens": target.tokens.record(),
        "train": recipe.train.record(),
        "lora": asdict(lora) if recipe.train.method == "lora" else None,
        "target": target.record(),
        "objective": recipe.objective.record(),
    }
