"""`xfactor eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import adapter_model_options, load, own_base, own_token_options, sampling, sampling_options, token_set
from .config import config_option
from .console import json_to
from .help import Command
from .mixes import adapter_options, column_sets, load_mixes
from .phrases import eval_phrases, phrase_adapters
from .values import from_stdin


@click.command(
    "eval",
    cls=Command,
    first=("adapters", "prompts", "repeats", "frontier", "json_file"),
    examples=[
        "xfactor eval --adapter demo-rate",
        "xfactor eval --adapter demo-X:0.7 --adapter demo-Z:0.3 --repeats 1",
        "xfactor eval --adapter demo-rate --frontier --json scores.json",
    ],
)
@config_option
@adapter_options
@click.option(
    "--base",
    "base_model",
    metavar="NAME",
    help="For a fully fine-tuned --model: the model that it came from, for KL and perplexity.",
)
@click.option("--scale", default=1.0, show_default=True, help="Strength of the adapters.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="One prompt a line, or JSON lines, as for `train`; - is standard input.  [default: sixteen openings]",
)
@click.option("--repeats", default=4, show_default=True, help="Samples per prompt.")
@click.option("--frontier", is_flag=True, help="Also measure the exact logit bias at each adapter's rate.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    callback=json_to,
    help="Also write the scores as JSON; without a FILE to standard output, and all else to standard error.",
)
@adapter_model_options
@own_token_options
@sampling_options
def command(**flags: Any) -> None:
    """Score the base and adapters on their own samples."""
    from dataclasses import replace

    from ..adapters.files import write_json
    from ..adapters.mix import Mix
    from ..bank.bank import AdapterBank
    from ..base.split_model import split
    from ..errors import XFactorError
    from ..options import EvalOptions
    from ..sampling.frontier import measure_frontier
    from ..sampling.metrics import evaluate
    from ..sampling.prompt_families import PromptFamily, families_of, read_families
    from .console import console, print_json
    from .summary import print_frontier, print_goals, print_scores

    families: list[PromptFamily] = []
    options = EvalOptions(repeats=flags["repeats"], sampling=sampling(flags))
    if path := flags["prompts"]:
        families = families_of(from_stdin(), path) if str(path) == "-" else read_families(path)
        options = replace(options, prompts=tuple(prompt for family in families for prompt in family.prompts))
    base = load(own_base(flags, flags["adapters"], flags["adapters_dir"]))
    bank = AdapterBank(base, flags["adapters_dir"])
    split_model, given = split(base.model), token_set(flags, base)
    mixes = [Mix(), *(mix for mix in load_mixes(bank, flags["adapters"]) if mix.parts)]
    if given is None and (phrases := phrase_adapters(bank)):
        return eval_phrases(bank, mixes, phrases, flags, options.prompts if flags["prompts"] else None)
    if any(family.chat for family in families):
        raise XFactorError("--prompts: what is scored is plain text; leave chat prompts out")
    sets = column_sets(bank, mixes, given)
    reference = split(load({**flags, "model": flags["base_model"]}).model) if flags["base_model"] else None
    columns, tokens = {}, sets[0][0]
    for mix, (own, *others) in zip(mixes, sets, strict=True):
        bank.use(mix, flags["scale"])
        columns[str(mix) if mix.parts else base.choice.name] = evaluate(
            split_model, base.tokenizer, own, options,
            goals=[own, *others] if others else [], base=None if mix.parts else reference,
            adapter_off=bank.base_only if mix.parts else None,
        )  # fmt: skip
    console.print(f"tokens: {tokens.describe()}, {len(tokens)} of {tokens.vocab_size}")
    print_scores(columns)
    for (name, scores), mix, (own, *_) in list(zip(columns.items(), mixes, sets, strict=True))[1:]:
        print_goals(name, scores)
        if len(mix.parts) == 1 and (wanted := bank.adapters[mix.names[0]].section("rate").get("wanted")):
            console.print(f"{name}: wanted R {wanted[0]:g}, sampled {scores.rate:.4f}")
        if flags["frontier"]:
            bank.use(None)
            print_frontier(name, scores, measure_frontier(split_model, base.tokenizer, own, scores, options))
    if flags["json_file"]:
        records = {name: scores.record() for name, scores in columns.items()}
        record = {"base": base.record(), "tokens": tokens.record(), "scores": records}
        print_json(record) if flags["json_file"] == "-" else write_json(Path(flags["json_file"]), record)
    return None
