"""`xfactor tokens`."""

from __future__ import annotations

from typing import Any

import click

from .common import default_set, load, model_options, sampling, sampling_options, token_options, token_set


@click.command("tokens")
@click.option("--examples", default=30, show_default=True, help="How many members to print.")
@model_options
@token_options
@sampling_options
def command(**flags: Any) -> None:
    """Show how many tokens a rule matches, examples, and the base model's own mass on them."""
    from ..base.split_model import split
    from ..options import EvalOptions
    from ..sampling.metrics import evaluate
    from ..tokens.token_bytes import spelling_text
    from .console import console
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
