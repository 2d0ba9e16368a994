"""`xfactor plan`."""

from __future__ import annotations

from typing import Any

import click

from .common import load_options, model_options
from .console import json_option, print_json, say
from .help import Command
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
def command(**flags: Any) -> None:  # fmt: skip
    """Predict peak memory and time of `xfactor train` with the same flags, before anything is loaded.

    Exit status 1 when the run does not fit.
    """
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
