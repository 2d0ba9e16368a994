"""`xfactor generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import load, model_options, sampling, sampling_options, token_options, token_set


@click.command("generate")
@click.argument("prompts", nargs=-1)
@click.option("--prompt", "more_prompts", multiple=True, help="The same as a PROMPTS argument; repeatable.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Name in the adapters folder, a path, or none; several print side by side.",
)
@click.option("--adapters-dir", type=click.Path(path_type=Path), default="adapters", show_default=True)
@click.option("--scale", default=1.0, show_default=True, help="Strength of the adapters; 0 is the base.")
@click.option("--rate", type=float, metavar="R", help="In place of --scale: the scale whose measured rate is R.")
@model_options
@token_options
@sampling_options
def command(**flags: Any) -> None:  # fmt: skip
    """Continue PROMPTS with the base or with adapters; tokens of the set are highlighted, R is printed.

    The set is each adapter's own, unless a token option gives one.
    """
    from rich.panel import Panel

    from ..bank import AdapterBank
    from ..errors import XFactorError
    from ..metrics import rate_per_sequence
    from .common import default_set
    from .console import console, highlighted

    options = sampling(flags)
    base = load(flags)
    bank = AdapterBank(base, flags["adapters_dir"])
    names = list(dict.fromkeys(flags["adapters"])) or ["none"]
    for name in names:
        if name != "none":
            bank.load(name)
    given, scales = token_set(flags, base), {}
    if flags["rate"] is not None:
        if flags["scale"] != 1.0:
            raise XFactorError("--rate and --scale exclude each other; give one")
        if not bank.adapters:
            raise XFactorError("--rate needs --adapter: it picks the adapter's scale")
        scales = {name: bank.scale_for_rate(name, flags["rate"]) for name in bank.adapters}
    shared = given or next((s for n in names if n != "none" and (s := bank.token_set(n))), None) or default_set(base)
    for prompt in [*flags["prompts"], *flags["more_prompts"]] or ["Once upon a time"]:
        console.print(f"\n{prompt!r}", style="bold", markup=False)
        for name in names:
            scale = flags["scale"] if flags["rate"] is None or name == "none" else scales[name]
            bank.use(None if name == "none" else name, scale)
            own = given or (bank.token_set(name) if name != "none" else None) or shared
            ids = bank.generate(prompt, options)
            rate = float(rate_per_sequence(_row(ids), own.mask())[0]) if ids else 0.0
            title = "base" if name == "none" else f"{name} x {scale:.3g}"
            footer = f"R {rate:.3f} of {len(ids)} tokens, {own.describe()}"
            body = highlighted(base.tokenizer, ids, own)
            console.print(Panel(body, title=title, subtitle=footer, title_align="left", subtitle_align="left"))


def _row(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])
