"""`xfactor generate`."""

from __future__ import annotations

from typing import Any

import click

from .common import chat_options, load_to_generate, model_options, sampling, sampling_options, token_options, token_set
from .mixes import adapter_options, column_sets, load_mixes


@click.command("generate")
@click.argument("prompts", nargs=-1)
@click.option("--prompt", "more_prompts", multiple=True, help="The same as a PROMPTS argument; repeatable.")
@adapter_options
@click.option("--scale", default=1.0, show_default=True, help="Strength of the adapters; 0 is the base.")
@click.option("--rate", type=float, metavar="R", help="In place of --scale: the scale whose measured rate is R.")
@model_options
@token_options
@sampling_options
@chat_options
def command(**flags: Any) -> None:
    """Continue or answer PROMPTS with the base or with adapters; tokens of the set are highlighted, R is printed.

    The set is each adapter's own, unless a token option gives one; a mix has one R for each of its adapters' sets.
    """
    from rich.panel import Panel
    from rich.text import Text

    from ..bank.bank import AdapterBank
    from ..tokens.printable import printable
    from .console import console, highlighted

    options = sampling(flags)
    base, chat = load_to_generate(flags)
    bank = AdapterBank(base, flags["adapters_dir"])
    mixes = _scaled(bank, load_mixes(bank, flags["adapters"] or ("none",)), flags)
    sets = column_sets(bank, mixes, token_set(flags, base))
    for prompt in [*flags["prompts"], *flags["more_prompts"]] or ["Once upon a time"]:
        console.print(f"\n{prompt!r}", style="bold")
        for mix, own in zip(mixes, sets, strict=True):
            bank.use(mix)
            ids = bank.generate(prompt, options, chat)
            rates = ", ".join(f"R {tokens.share(ids):.3f} of {len(ids)} tokens, {tokens.describe()}" for tokens in own)
            body = highlighted(base.tokenizer, ids, own)
            console.print(
                Panel(
                    body,
                    title=Text(printable(_title(mix))),
                    subtitle=Text(printable(rates)),
                    title_align="left",
                    subtitle_align="left",
                )
            )


def _scaled(bank: Any, mixes: list[Any], flags: dict[str, Any]) -> list[Any]:
    """The mixes at --scale, or at the scale that --rate asks of single adapters."""
    from ..adapters.mix import Mix
    from ..errors import XFactorError

    if flags["rate"] is None:
        return [mix.scaled(flags["scale"]) for mix in mixes]
    if flags["scale"] != 1.0:
        raise XFactorError("--rate and --scale exclude each other; give one")
    if not bank.adapters:
        raise XFactorError("--rate needs --adapter: it picks the adapter's scale")
    if any(len(mix.parts) > 1 for mix in mixes):
        raise XFactorError("--rate picks the scale of one adapter; a mix has its weights already")
    return [Mix(tuple((name, bank.scale_for_rate(name, flags["rate"])) for name in mix.names)) for mix in mixes]


def _title(mix: Any) -> str:
    if len(mix.parts) != 1:
        return str(mix)
    return f"{mix.names[0]} x {mix.parts[0][1]:.3g}"
