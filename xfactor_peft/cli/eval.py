"""`xfactor eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .common import default_set, load, model_options, sampling, sampling_options, token_options, token_set


@click.command("eval")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Name or path; repeatable.")
@click.option("--adapters-dir", type=click.Path(path_type=Path), default="adapters", show_default=True)
@click.option(
    "--base",
    "base_model",
    metavar="NAME",
    help="For a fully fine-tuned --model: the model that it came from, for KL and perplexity.",
)
@click.option("--scale", default=1.0, show_default=True, help="Strength of the adapters.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt a line.  [default: sixteen openings]",
)
@click.option("--repeats", default=4, show_default=True, help="Samples per prompt.")
@click.option("--frontier", is_flag=True, help="Also measure the exact logit bias at each adapter's rate.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores here."
)
@model_options
@token_options
@sampling_options
def command(**flags: Any) -> None:  # fmt: skip
    """Score the base and adapters on their own samples."""
    from dataclasses import replace

    from ..bank import AdapterBank
    from ..errors import XFactorError
    from ..frontier import measure_frontier
    from ..head import split
    from ..metrics import EvalOptions, evaluate
    from .console import console
    from .summary import print_frontier, print_scores

    options = EvalOptions(repeats=flags["repeats"], sampling=sampling(flags))
    if flags["prompts"]:
        lines = flags["prompts"].read_text(encoding="utf-8").splitlines()
        options = replace(options, prompts=tuple(line for line in lines if line.strip()))
        if not options.prompts:
            raise XFactorError(f"--prompts {flags['prompts']} holds no prompt")
    base = load(flags)
    bank = AdapterBank(base, flags["adapters_dir"])
    halves, given, columns = split(base.model), token_set(flags, base), {}
    infos = {name: bank.load(name) for name in dict.fromkeys(flags["adapters"])}
    tokens = given or next((s for n in infos if (s := bank.token_set(n))), None) or default_set(base)
    bank.use(None)
    reference = split(load({**flags, "model": flags["base_model"]}).model) if flags["base_model"] else None
    columns[base.choice.name] = evaluate(halves, base.tokenizer, tokens, options, base=reference)
    for name in infos:
        bank.use(name, flags["scale"])
        own = given or bank.token_set(name) or tokens
        columns[name] = evaluate(halves, base.tokenizer, own, options, adapter_off=bank.off)
    console.print(f"tokens: {tokens.describe()}, {len(tokens)} of {tokens.vocab_size}", markup=False)
    print_scores(columns)
    for name, info in infos.items():
        if wanted := (info.record.get("rate") or {}).get("wanted"):
            console.print(f"{name}: wanted R {wanted[0]:g}, sampled {columns[name].rate:.4f}", markup=False)
        if flags["frontier"]:
            bank.use(None)
            own = given or bank.token_set(name) or tokens
            print_frontier(name, columns[name], measure_frontier(halves, base.tokenizer, own, columns[name], options))
    if flags["json_file"]:
        scores = {name: scores.record() for name, scores in columns.items()}
        record = {"base": base.record(), "tokens": tokens.record(), "scores": scores}
        flags["json_file"].write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
