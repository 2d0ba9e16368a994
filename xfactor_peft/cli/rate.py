"""The options of `xfactor train` that say how much of a set is wanted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from ..options import SAME_RATE, ObjectiveOptions, RateOptions
from .common import Command, apply_options, default_set, token_set
from .values import RATE

if TYPE_CHECKING:
    from ..base.vocabulary import Vocabulary
    from ..objective.targets import Target, TiltedTarget, UniformTarget


RATE_FLAGS = ("same_rate", "prompts", "temperature", "top_k", "top_p")


def rate_options(function: Command) -> Command:
    """--target-rate, --lambda, --goal, --same-rate, --prompts, --temperature, --sequence-level, --contexts, ..."""
    return apply_options(
        [
            click.option("--target-rate", type=RATE, metavar="R",
                         help="Wanted share of set tokens in the samples, e.g. 10% or 0.1; 0 means never."),
            click.option("--lambda", "strength", type=float, metavar="L",
                         help="In place of a rate: add L to the logits of the set."),
            click.option("--goal", "goals", multiple=True, metavar="KIND:VALUE=RATE",
                         help='Several sets at once, e.g. "contains:X=10%" or "words:fox,dog=2%"; repeatable.'),
            click.option("--same-rate", type=click.Choice(SAME_RATE),
                         help="Hold the rate after every family of prompts, by a term that looks at the text, or on "
                         "average over them, by a constant.  [default: everywhere where a set head alone is trained]"),
            click.option("--prompts", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                         help="Hold the rate after prompts like these: one a line, an empty line between families, or "
                         'JSON lines {"prompt", "family", "chat"}.  [default: a bundled set]'),
            click.option("--temperature", default=1.0, show_default=True, help="Decoding that the rate is for."),
            click.option("--top-k", default=0, show_default=True, help="The same; 0 switches it off."),
            click.option("--top-p", default=1.0, show_default=True, help="The same; 1 switches it off."),
            click.option("--sequence-level", is_flag=True, help="For a rate: learn to plan whole texts."),
            click.option("--sequence-steps", default=80, show_default=True, help="Batches of that phase."),
            click.option("--outside-price", default=1.0, show_default=True, metavar="W",
                         help="Of that phase: what a nat outside of the set costs beside its KL; 0 for the least KL."),
            click.option("--contexts", metavar="random|self|FILE",
                         help="Texts to train on.  [default: random; self for a rate]"),
            click.option("--kl-to-base", default=0.0, show_default=True, metavar="W",
                         help="Add W times KL(base || model) to the uniform target's loss."),
            click.option("--no-early-stop", is_flag=True, help="For a rate: run all steps."),
            click.option("--no-dial", is_flag=True, help="For a rate: do not measure R at several scales."),
        ],
        function,
        "How much of it",
    )  # fmt: skip


def check_rate_flags(flags: dict[str, Any]) -> None:
    """Raises XFactorError for options that exclude each other, before anything is loaded."""
    given = [
        name
        for name, value in (
            ("--target-rate", flags["target_rate"]), ("--lambda", flags["strength"]), ("--goal", flags["goals"] or None)
        )
        if value is not None
    ]  # fmt: skip
    if len(given) > 1:
        raise XFactorError(f"{' and '.join(given)} exclude each other; give one")
    rules = [name for name in ("contains", "regex", "words", "token_ids") if flags.get(name) is not None]
    if flags["goals"] and rules:
        raise XFactorError(f"--goal names its own set; drop --{rules[0].replace('_', '-')}")
    if not given and flags["target"] and flags["target"].endswith("head"):
        raise XFactorError(f"--target {flags['target']} needs a rate: give --target-rate, --lambda or --goal")
    if given and flags.get("preset"):
        raise XFactorError(f"--preset {flags['preset']} is a uniform target; drop {given[0]}")
    if given and flags["method"] == "full":
        raise XFactorError(f"{given[0]} needs --method lora: the base must stay there to be tilted")
    if given and (flags.get("alpha", 1.0) != 1.0 or flags.get("beta", 0.0) != 0.0):
        raise XFactorError(f"--alpha and --beta belong to the uniform target; drop them or {given[0]}")


def objective_options(flags: dict[str, Any]) -> ObjectiveOptions:
    """What training looks at and how it stops."""
    return ObjectiveOptions(
        contexts=flags["contexts"],
        kl_to_base=flags["kl_to_base"],
        sequence_level=flags["sequence_level"],
        sequence_steps=flags["sequence_steps"],
        outside_price=flags["outside_price"],
        early_stop=not flags["no_early_stop"],
        dial=not flags["no_dial"],
        rate=RateOptions(**{name: flags[name] for name in RATE_FLAGS}),
    )


def target_kind(flags: dict[str, Any]) -> type[UniformTarget] | type[TiltedTarget]:
    """The class of the target: tilted when a rate is wanted. Known before there is a tokenizer."""
    from ..objective.targets import TiltedTarget, UniformTarget

    wanted = flags["target_rate"] is not None or flags["strength"] is not None or bool(flags["goals"])
    return TiltedTarget if wanted else UniformTarget


def make_target(flags: dict[str, Any], base: Vocabulary) -> Target:
    """The tilted target when a rate is wanted, else the uniform one."""
    from ..objective.goals import parse_goal
    from ..objective.targets import TiltedTarget, UniformTarget

    if flags["goals"]:
        parse = partial(
            parse_goal, tokenizer=base.tokenizer, vocab_size=base.vocab_size, ignore_case=flags["ignore_case"]
        )
        return TiltedTarget(tuple(map(parse, flags["goals"])))
    tokens = token_set(flags, base) or default_set(base)
    if target_kind(flags) is TiltedTarget:
        return TiltedTarget.of(tokens, flags["target_rate"], strength=flags["strength"])
    return UniformTarget(tokens, flags["alpha"], flags["beta"])
