"""`xfactor tokens`."""

from __future__ import annotations

from typing import Any

import click

from .common import default_set, load, model_options, sampling, sampling_options, token_options, token_set
from .console import json_option
from .help import Command


@click.command(
    "tokens",
    cls=Command,
    examples=[
        "xfactor tokens --model demo --contains X --ignore-case",
        "xfactor tokens --model demo --words sea,ship,captain",
    ],
)
@click.option("--examples", default=30, show_default=True, help="How many members to print.")
@model_options
@token_options
@sampling_options
@json_option
def command(**flags: Any) -> None:
    """Show how many tokens a rule matches, examples, and the base model's own mass on them."""
    from ..base.split_model import split
    from ..options import EvalOptions
    from ..sampling.metrics import evaluate
    from ..tokens.token_bytes import spelling_text
    from .console import console, print_json
    from .summary import decoding_text, rate_text

    options = EvalOptions(sampling=sampling(flags))
    base = load(flags)
    tokens = token_set(flags, base) or default_set(base)
    console.print(f"vocabulary: {spelling_text(base.tokenizer)}")
    console.print(f"{tokens.describe()}: {len(tokens)} of {tokens.vocab_size} tokens")
    shown = ", ".join(repr(text) for text in tokens.texts[: flags["examples"]])
    console.print(shown + (" …" if len(tokens) > flags["examples"] else ""))
    if tokens.without_token:
        console.print(f"no single token: {', '.join(tokens.without_token)}")
    scores = evaluate(split(base.model), base.tokenizer, tokens, options)
    console.print(f"the model's own mass on the set {scores.set_mass:.6f}, R {rate_text(scores)}")
    console.print(f"over samples: {decoding_text(scores.decoding)}", style="dim")
    if flags["as_json"]:
        print_json({"base": base.record(), "tokens": tokens.record(), "texts": tokens.texts, "scores": scores.record()})
