"""`xfactor tokens`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from .common import (
    default_set,
    load,
    model_options,
    sampling,
    sampling_options,
    token_options,
    token_set,
)
from .console import console, json_option, print_json
from .help import Command

if TYPE_CHECKING:
    from ..base.loading import Base
    from ..tokens.token_set import TokenSet

WITHOUT_MODEL: tuple[str, ...] = ("measure", "examples", "model", "revision", "offline", "as_json")
WITHOUT_MODEL += ("contains", "regex", "words", "token_ids", "ignore_case")
"""Options that have a meaning where only the tokenizer is read."""


@click.command(
    "tokens",
    cls=Command,
    first=("model", "contains", "words", "ignore_case", "measure"),
    examples=[
        "xfactor tokens --model demo --contains X --ignore-case",
        "xfactor tokens --model demo --words sea,ship,captain",
    ],
)
@click.option("--examples", default=30, show_default=True, help="How many members to print.")
@click.option("--measure", is_flag=True, help="Load the model, too, and measure its own mass on them by samples.")
@model_options
@token_options
@sampling_options
@json_option
@click.pass_context
def command(ctx: click.Context, **flags: Any) -> None:
    """Show how many tokens a rule matches, and examples; with --measure the base model's own mass on them."""
    from ..base.resolve import resolve_model
    from ..base.vocabulary import read_vocabulary
    from ..tokens.token_bytes import spelling_text

    for parameter in ctx.command.params if not flags["measure"] else ():
        name = str(parameter.name)
        if name not in WITHOUT_MODEL and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise XFactorError(f"{parameter.opts[0]} is for measuring the model's own mass; add --measure")
    base = load(flags) if flags["measure"] else None
    where = {"offline": flags["offline"], "revision": flags["revision"]}
    vocabulary = base or read_vocabulary(resolve_model(flags["model"], **where))
    tokens = token_set(flags, vocabulary) or default_set(vocabulary)
    console.print(f"vocabulary: {spelling_text(vocabulary.tokenizer)}")
    console.print(f"{tokens.describe()}: {len(tokens)} of {tokens.vocab_size} tokens")
    shown = ", ".join(repr(text) for text in tokens.texts[: flags["examples"]])
    console.print(shown + (" …" if len(tokens) > flags["examples"] else ""))
    if tokens.without_token:
        console.print(f"no single token: {', '.join(tokens.without_token)}")
    record: dict[str, Any] = {"tokens": tokens.record(), "texts": tokens.texts}
    if base is not None:
        record |= {"base": base.record(), "scores": _measure(base, tokens, flags)}
    if flags["as_json"]:
        print_json(record)


def _measure(base: Base, tokens: TokenSet, flags: dict[str, Any]) -> dict[str, Any]:
    """Print the model's own mass on the set; returns the scores' record."""
    from ..base.split_model import split
    from ..options import EvalOptions
    from ..progress import phase
    from ..sampling.metrics import evaluate
    from .progress import TrainingProgress
    from .summary import decoding_text, rate_text

    options = EvalOptions(sampling=sampling(flags))
    with TrainingProgress(0), phase("measuring R"):
        scores = evaluate(split(base.model), base.tokenizer, tokens, options)
    console.print(f"the model's own mass on the set {scores.set_mass:.6f}, R {rate_text(scores)}")
    console.print(f"over samples: {decoding_text(scores.decoding)}", style="dim")
    return scores.record()
