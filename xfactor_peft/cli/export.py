"""`xfactor export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import adapters_dir_option, load, model_options, own_base
from .console import say

FORMATS = ["merged", "gguf", "gguf-lora", "onnx", "logit-bias"]


@click.command("export")
@click.argument("adapter", metavar="NAME[:WEIGHT][+NAME:WEIGHT...]")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="merged", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where to write.  [default: exports/NAME-FORMAT]")
@adapters_dir_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@model_options
def command(adapter: str, kind: str, output: Path | None, adapters_dir: Path, force: bool, **flags: Any) -> None:
    """Write an adapter, or a weighted mix, for programs that know nothing of this one.

    The base is the adapter's own unless --model names another place of it. It is loaded unquantised, in float32 unless
    --dtype says otherwise, whatever the adapter was trained on.
    """
    from ..adapters.adapter import list_adapters
    from ..adapters.mix import parse_mix
    from ..bank.bank import AdapterBank
    from ..export import default_output, export

    flags["dtype"] = "fp32" if flags["dtype"] == "auto" else flags["dtype"]
    mix = parse_mix(adapter, list_adapters(adapters_dir))
    bank = AdapterBank(load(own_base(flags, adapter, adapters_dir)), adapters_dir)
    for name in mix.names:
        bank.load(name)
    say(export(bank, mix, kind, output or default_output(adapter, kind), force=force))
