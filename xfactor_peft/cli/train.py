"""`xfactor train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import OPTIMIZERS, EvalOptions, MemoryOptions, SamplingOptions
from ..training.parallel import process, quiet_unless_first
from .common import apply_options, load_chosen, load_options, model_options, token_options
from .config import config_option, given, write_run
from .console import json_option, print_json, say
from .help import Command
from .phrases import phrase_options, run_phrases, wants_phrases
from .rate import check_rate_flags, make_target, rate_options
from .resuming import name_resume_command, resumed, resuming_options, to_settings
from .run_options import fitting_plan, make_recipe, run_options
from .tracking import tracking, tracking_options

if TYPE_CHECKING:
    from ..base.loading import Base
    from ..base.resolve import ModelChoice
    from ..budget.plan import Plan
    from ..checkpoint.state import Step
    from ..options import LoadOptions, Recipe

# The original exercise (mikexcohen/LLM_course, "Maximize the X factor"): full fine-tuning towards lowercase "x".
SOURCE_PRESET = {
    "contains": "x", "method": "full", "optimizer": "adamw", "lr": 1e-6, "weight_decay": 0.01,
    "steps": 300, "batch_size": 4, "seq_len": 64, "alpha": 1.0, "beta": 0.0,
}  # fmt: skip
SOURCE_PROMPT, SOURCE_TOKENS, SOURCE_TOP_K = "Why did the chicken cross the road?", 200, 50


def learning_options(function: Any) -> Any:
    """How a run learns, and how R is measured."""
    learning = [
        click.option("--steps", default=300, show_default=True, help="Steps of training; a rate may need fewer."),
        click.option("--lr", type=float, help="Learning rate.  [default: 1e-3 for lora, 1e-4 for full]"),
        click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adam", show_default=True,
                     help="Which of them."),
        click.option("--weight-decay", default=0.0, show_default=True, help="Of AdamW and its kin."),
        click.option("--alpha", default=1.0, show_default=True, help="Target weight of every token in the set."),
        click.option("--beta", default=0.0, show_default=True, help="Target weight of every other token."),
        click.option("--seed", default=0, show_default=True, help="Of training, and of the samples that measure R."),
        click.option("--fsdp", is_flag=True, help="Shard all weights over several processes."),
    ]  # fmt: skip
    measuring = [
        click.option("--eval-tokens", type=int, help="Tokens per sample when R is measured.  [default: 64]"),
        click.option("--eval-repeats", default=4, show_default=True, help="Samples per prompt when R is measured."),
        click.option("--no-eval", is_flag=True, help="Do not measure R before and after."),
    ]
    return apply_options(learning, apply_options(measuring, function, "Measuring R"), "Learning")


@click.command(
    "train",
    cls=Command,
    first=("model", "contains", "target_rate", "memory_budget", "output"),
    examples=[
        "xfactor train --model demo",
        "xfactor train --model demo --contains X --ignore-case --target-rate 10%",
        "xfactor train --model demo --words sea,ship,captain --target-rate 5%",
        "xfactor train --model demo --contains q --target-rate 0",
        "xfactor train --model demo --load-in-8bit --memory-budget 1GiB",
        "xfactor train --config adapters/X-lora-r8/run.yaml --force",
    ],
)
@config_option
@model_options
@token_options
@run_options
@rate_options
@phrase_options
@learning_options
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where to write.  [default: adapters/, and a name made from the set and the method]",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@resuming_options
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the finished adapter.")
@tracking_options
@json_option
@click.option(
    "--preset",
    type=click.Choice(["source"]),
    help='The original exercise\'s recipe: full fine-tuning, "x", AdamW at 1e-6, one top-50 sample.',
)
@click.pass_context
def command(ctx: click.Context, **flags: Any) -> None:  # fmt: skip
    """Train LoRA adapters (or all weights) so that the model prefers a set of tokens.

    With no option at all: rank-8 adapters for every token that contains "X".
    """
    if flags["resume"]:
        flags = resumed(ctx, flags)
    elif flags["preset"] == "source":
        apply_preset(ctx, flags)
    if wants_phrases(flags):
        return run_phrases(ctx, flags)
    with quiet_unless_first():
        run(ctx, flags)


def apply_preset(ctx: click.Context, flags: dict[str, Any]) -> None:
    """Fill in the preset's values where the user gave none; a token rule of the user's replaces the preset's."""
    rule_given = any(flags[name] is not None for name in ("contains", "regex", "words", "token_ids"))
    for name, value in SOURCE_PRESET.items():
        if not given(ctx, name) and not (name == "contains" and rule_given):
            flags[name] = value


def run(ctx: click.Context, flags: dict[str, Any]) -> None:
    """Check every flag, plan, load, train with a progress bar, print the summary."""
    load = load_options(flags, master_weights=flags["method"] == "full")

    from ..adapters.hub import check_push, push
    from ..base.resolve import resolve_model
    from ..base.vocabulary import read_vocabulary
    from ..runs.folder import check_output
    from ..runs.run import FolderOptions, default_name, train_to_folder
    from ..runs.tracking import check_trackers
    from .plan_text import print_expectation
    from .progress import TrainingProgress
    from .summary import print_start, print_summary

    check_rate_flags(flags)
    recipe = make_recipe(flags)
    check_trackers(flags["trackers"])
    if flags["push_to_hub"]:
        check_push(flags["push_to_hub"])
    choice = resolve_model(flags["model"], offline=flags["offline"], revision=flags["revision"])
    vocabulary = read_vocabulary(choice)
    target = make_target(flags, vocabulary)
    assert recipe.lora is not None  # `make_recipe` decides it
    output = flags["output"] or Path("adapters") / default_name(target, recipe.train, recipe.lora)
    name_resume_command(output)
    if not flags["resume"]:
        check_output(output, force=flags["force"])
    plan, load = _plan(flags, choice, load, recipe)
    base = load_chosen(choice, load, vocabulary=vocabulary)
    if flags["preset"] == "source" and recipe.evaluation:
        repeats = flags["eval_repeats"] if given(ctx, "eval_repeats") else 1
        recipe = replace(recipe, evaluation=_source_evaluation(base, flags, repeats))
    print_start(base, target, recipe)
    if plan is not None:
        recipe = replace(recipe, memory=_as_planned(recipe.memory, plan, packed=choice.gguf is not None))
        print_expectation(plan)
    folder = FolderOptions(flags["force"], bool(flags["resume"]), flags["save_every"], to_settings(flags, output))
    steps = recipe.train.steps + (recipe.objective.sequence_steps if recipe.objective.sequence_level else 0)
    with tracking(flags, output.name, recipe.train.record()) as trackers:
        with TrainingProgress(steps) as progress:

            def on_step(step: Step) -> None:
                progress.update(step)
                trackers(step)

            result, record = train_to_folder(base, target, output, recipe, folder, plan=plan, on_step=on_step)
        if result.before and result.after:
            trackers.log({"R/before": result.before.rate, "R/after": result.after.rate}, len(result.history))
    if process()[0] == 0:
        write_run(ctx, flags, choice, output)
    print_summary(result, record, output)
    if flags["as_json"]:
        print_json({"output": str(output), **record})
    if flags["push_to_hub"]:
        say(f"pushed to {push(output, flags['push_to_hub'])}")


def _plan(
    flags: dict[str, Any], choice: ModelChoice, load: LoadOptions, recipe: Recipe
) -> tuple[Plan | None, LoadOptions]:
    """What the run will take, the vocabulary being read, and how to load for it.

    None where that cannot be said, unless a budget depends on it.

    Raises:
        XFactorError: the run does not fit the budget, or nothing can be said about one.
    """
    from ..budget.plan import require_fit
    from ..errors import XFactorError
    from ..lowmem.allocator import give_back_pages

    give_back_pages()
    try:
        # the run itself will show its pace; timing blocks first takes seconds, and memory that stays
        plan, load = fitting_plan(flags, choice, load, recipe, before=False)
    except XFactorError:
        if recipe.memory.budget:
            raise
        return None, load
    if recipe.memory.budget:
        require_fit(plan)
    return plan, load


def _as_planned(memory: MemoryOptions, plan: Plan, *, packed: bool) -> MemoryOptions:
    """The planned number of recomputed blocks, and without a budget a rest of the run below what training takes.

    A packed file has a promise to keep in place of both: the run counts again with what it really holds.
    """
    if packed and memory.checkpointing == "auto":
        return memory
    return MemoryOptions(plan.recomputed, memory.budget or plan.memory.total)


def _source_evaluation(base: Base, flags: dict[str, Any], repeats: int) -> EvalOptions:
    """Top-50 samples as in the original exercise, 200 tokens in all unless other tokens are asked for."""
    new = flags["eval_tokens"]
    if new is None:
        new = SOURCE_TOKENS - len(base.tokenizer(SOURCE_PROMPT)["input_ids"])
    sampling = SamplingOptions(max_new_tokens=new, top_k=SOURCE_TOP_K, seed=flags["seed"])
    return EvalOptions((SOURCE_PROMPT,), repeats, sampling)
