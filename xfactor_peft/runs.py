"""A training run in a folder: metrics while it runs, everything in place when it is done, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .adapters import prepare_output, publish, save_result
from .budget.options import MemoryOptions
from .budget.plan import Plan
from .errors import XFactorError
from .loading import Base
from .lora import LoraOptions
from .metrics import EvalOptions
from .objectives import ObjectiveOptions
from .targets import TiltedTarget, UniformTarget
from .tokens import TokenSet
from .training import Step, TrainOptions, TrainResult, default_lora, train

METRICS = "metrics.jsonl"


def default_name(
    tokens: TokenSet, options: TrainOptions, lora: LoraOptions, target: UniformTarget | TiltedTarget | None = None
) -> str:
    """A folder name from the rule and the method, e.g. "X-lora-r8" or, for a rate, "X-rate-0.1-head"."""
    rule = tokens.rule
    value = rule["value"] if isinstance(rule.get("value"), str) else f"{rule.get('kind')}-{tokens.hash[:8]}"
    plain = re.sub(r"[^\w-]+", "_", value, flags=re.ASCII).strip("_") or f"{rule.get('kind')}-{tokens.hash[:8]}"
    method = f"{lora.variant.replace('+', '-plus')}-r{lora.r}" if options.method == "lora" else "full"
    if isinstance(target, TiltedTarget):
        goal = target.goals[0]
        wish = f"rate-{goal.rate:g}" if goal.rate is not None else f"lambda-{goal.strength:g}"
        several = f"-and-{len(target.goals) - 1}-more" if len(target.goals) > 1 else ""
        method = f"{wish}{several}-{lora.target.replace(',', '-')}"
    return f"{plain}{'-any-case' if rule.get('ignore_case') else ''}-{method}"


def train_to_folder(
    base: Base,
    target: UniformTarget | TiltedTarget,
    output: Path,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    lora: LoraOptions | None = None,
    evaluation: EvalOptions = EvalOptions(),  # noqa: B008 (frozen)
    objective: ObjectiveOptions = ObjectiveOptions(),  # noqa: B008 (frozen)
    memory: MemoryOptions = MemoryOptions(),  # noqa: B008 (frozen)
    *,
    plan: Plan | None = None,
    force: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """`train`, with its results in `output`; returns the result and the record written.

    While it runs, `metrics.jsonl` grows in a hidden folder beside `output`: a first line with the model, the
    token set and the settings, then one line a step. The folder takes its name when everything is in it. `plan` is what
    was predicted of the run, for the record.

    Raises:
        XFactorError: `output` exists and `force` is off, it cannot be written, or training fails.
    """
    lora = lora or default_lora(target, objective)
    staging = prepare_output(output, force=force)
    with (staging / METRICS).open("w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        def log(step: Step) -> None:
            write(asdict(step))
            if on_step:
                on_step(step)

        write(
            {
                "base": base.record(),
                "tokens": target.tokens.record(),
                "train": options.record(),
                "lora": asdict(lora) if options.method == "lora" else None,
                "target": target.record(),
                "objective": objective.record(),
            }
        )
        header_end = file.tell()
        try:
            result = train(base, target, options, lora, evaluation, objective, memory, on_step=log)
        except XFactorError:
            if file.tell() == header_end:  # not one step was made, so there is nothing worth keeping
                shutil.rmtree(staging)
            raise
    result.plan = plan
    try:
        record = save_result(result, staging, output.name)
        publish(staging, output)
    except OSError as error:
        raise XFactorError(
            f"{output} cannot be written ({error.strerror}); what there is stays in {staging}"
        ) from error
    return result, record
