"""`xfactor plan`."""

from __future__ import annotations

from copy import copy
from typing import Any

import click

from ..errors import XFactorError
from . import train
from .common import load_options, model_options
from .console import json_option, print_json, say
from .help import Command
from .phrases import wants_phrases
from .rate import check_rate_flags, rate_options
from .run_options import fitting_plan, make_recipe, run_options


@click.command(
    "plan",
    cls=Command,
    first=("model", "load_in_8bit", "load_in_4bit", "checkpointing", "memory_budget"),
    examples=[
        "xfactor plan --model demo",
        "xfactor plan --model demo --load-in-8bit --checkpointing on --memory-budget 1GiB",
        "xfactor plan --model demo --target-rate 10% --json",
    ],
)
@model_options
@run_options
@rate_options
@json_option
@click.pass_context
def command(ctx: click.Context, **flags: Any) -> None:  # fmt: skip
    """Predict peak memory and time of `xfactor train` with the same flags, before anything is loaded.

    Every option of `train` is taken; shown are those that matter here. Exit status 1 when the run does not fit.
    """
    if flags["resume"] or wants_phrases(flags):
        raise XFactorError("a plan is of a new run for tokens; leave out --resume, and options for words and phrases")
    if flags["preset"]:
        train.apply_preset(ctx, flags)
    load = load_options(flags, master_weights=flags["method"] == "full")  # first: it leaves libraries out

    from ..base.resolve import resolve_model
    from .flags import as_flags
    from .plan_text import print_plan

    check_rate_flags(flags)
    choice = resolve_model(flags["model"], offline=flags["offline"], revision=flags["revision"])
    say(as_flags(f"model {choice.name} ({choice.reason})"))
    plan, load = fitting_plan(flags, choice, load, make_recipe(flags))
    print_plan(plan)
    if flags["as_json"]:
        print_json({"model": choice.name, **plan.record()})
    if not plan.fits:
        raise SystemExit(1)


for option in train.command.params:  # so that a command line can be tried with `plan` in place of `train`
    if option.name not in {known.name for known in command.params}:
        command.params.append(other := copy(option))
        other.hidden = True  # type: ignore[attr-defined]  # it is an option
