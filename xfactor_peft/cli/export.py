"""`xfactor export`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from .common import adapters_dir_option, base_options, load, own_base
from .console import say
from .help import Command
from .values import ADAPTER

FORMATS = ["merged", "gguf", "gguf-lora", "ollama", "onnx", "logit-bias"]


@click.command(
    "export",
    cls=Command,
    first=("kind", "output", "tensors", "adapters_dir", "force"),
    examples=[
        "xfactor export demo-X --output exports/X",
        "xfactor export demo-X:0.7+demo-Z:0.3",
        "xfactor export demo-rate --format logit-bias",
    ],
)
@click.argument("adapter", type=ADAPTER, metavar="NAME[:WEIGHT][+NAME:WEIGHT...]")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default="merged",
    show_default=True,
    help="What for: see docs/export.md.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Where to write.  [default: exports/NAME-FORMAT]")
@click.option(
    "--tensors",
    type=click.Choice(["same", "f16"]),
    help="For gguf from a GGUF base: pack what the adapter touches as it was, which rounds a small adapter away, or as "
    "F16.  [default: f16]",
)
@adapters_dir_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@partial(base_options, dtype="fp32")
def command(
    adapter: str, kind: str, output: Path | None, adapters_dir: Path, force: bool, tensors: str | None, **flags: Any
) -> None:
    """Write an adapter, or a weighted mix, for programs that know nothing of this one.

    The base is loaded unquantised, whatever the adapter was trained on.
    """
    from ..adapters.adapter import list_adapters
    from ..adapters.mix import parse_mix
    from ..bank.bank import AdapterBank
    from ..export import default_output, export

    mix = parse_mix(adapter, list_adapters(adapters_dir))
    bank = AdapterBank(load(own_base(flags, [adapter], adapters_dir)), adapters_dir)
    for name in mix.names:
        bank.load(name)
    say(export(bank, mix, kind, output or default_output(adapter, kind), force=force, tensors=tensors))
