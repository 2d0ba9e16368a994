"""`xfactor generate`."""

from __future__ import annotations

from typing import Any

import click

from .common import (
    adapter_model_options,
    chat_options,
    load_to_generate,
    own_base,
    own_token_options,
    sampling,
    sampling_options,
    token_set,
)
from .config import config_option
from .console import json_option
from .help import Command
from .mixes import adapter_options, column_sets, load_mixes
from .phrases import mark_patterns
from .values import RATE, from_stdin


@click.command(
    "generate",
    cls=Command,
    first=("adapters", "scale", "rate", "max_new_tokens", "seed"),
    examples=[
        'xfactor generate --adapter none --adapter demo-rate "Once upon a time"',
        'xfactor generate --adapter demo-rate --rate 5% "The captain stood on the deck and"',
        'xfactor generate --adapter demo-X:0.3+demo-Z:0.3 --max-new-tokens 32 "My dear friend,"',
        "echo The sea was | xfactor generate --adapter demo-rate --json -",
    ],
)
@config_option
@click.argument("prompts", nargs=-1)
@click.option("--prompt", "more_prompts", multiple=True, help="The same as a PROMPTS argument; repeatable.")
@adapter_options
@click.option("--scale", default=1.0, show_default=True, help="Strength of the adapters; 0 is the base.")
@click.option("--rate", type=RATE, metavar="R", help="In place of --scale: the scale whose measured rate is R.")
@json_option
@adapter_model_options
@own_token_options
@sampling_options
@chat_options
def command(**flags: Any) -> None:
    """Continue or answer PROMPTS with the base or with adapters; tokens of the set are highlighted, R is printed.

    The set is each adapter's own, unless a token option gives one; a mix has one R for each of its adapters' sets.
    A prompt "-" is all of standard input. Without a prompt it is "Once upon a time".
    """
    from ..bank.bank import AdapterBank
    from ..phrases.goals import patterns_of
    from ..tokens.printable import counted
    from .console import console, highlighted, print_json, print_text

    options = sampling(flags)
    names = flags["adapters"] or ("none",)
    base, chat = load_to_generate(own_base(flags, names, flags["adapters_dir"]))
    bank = AdapterBank(base, flags["adapters_dir"])
    mixes = _scaled(bank, load_mixes(bank, names), flags)
    given_set, patterns = token_set(flags, base), patterns_of(bank.adapters.values())
    only_phrases = patterns and given_set is None and all(info.token_rule is None for info in bank.adapters.values())
    sets = [[] for _ in mixes] if only_phrases else column_sets(bank, mixes, given_set)
    given = [from_stdin() if prompt == "-" else prompt for prompt in [*flags["prompts"], *flags["more_prompts"]]]
    results = []
    for prompt in given or ["Once upon a time"]:
        console.print(f"\n{prompt!r}", style="bold")
        for mix, own in zip(mixes, sets, strict=True):
            bank.use(mix)
            ids = bank.generate(prompt, options, chat)
            notes = [f"R {tokens.share(ids):.3f} of {len(ids)} tokens, {tokens.describe()}" for tokens in own]
            body, record = highlighted(base.tokenizer, ids, own), _record(base, prompt, mix, ids, own)
            if patterns:
                record["occurrences"] = mark_patterns(body, patterns)
                notes.append(f"{counted(record['occurrences'], 'occurrence')} of {counted(len(patterns), 'pattern')}")
            print_text(_title(mix), body, ", ".join(notes))
            results.append(record)
    if flags["as_json"]:
        print_json(results)


def _record(base: Any, prompt: str, mix: Any, ids: list[int], sets: list[Any]) -> dict[str, Any]:
    rates = [{"tokens": tokens.describe(), "rate": tokens.share(ids)} for tokens in sets]
    return {
        "prompt": prompt,
        "adapter": str(mix),
        "text": str(base.tokenizer.decode(ids)),
        "new_tokens": len(ids),
        "rates": rates,
    }


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
