"""`xfactor playground`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import adapters_dir_option, load, model_options
from .console import say
from .help import Command


@click.command(
    "playground",
    cls=Command,
    first=("model", "adapters_dir", "port", "host", "load_in_8bit"),
    examples=["xfactor playground --model demo"],
)
@adapters_dir_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Other addresses let others in: there is no login."
)
@click.option("--port", default=7860, show_default=True, help="Where the page is: http://HOST:PORT/.")
@model_options
def command(adapters_dir: Path, host: str, port: int, **flags: Any) -> None:
    """Try adapters in the browser: side by side with the base, with sliders for scale and rate."""
    from ..bank.bank import AdapterBank
    from ..playground import launch, require_gradio

    require_gradio()
    bank = AdapterBank(load(flags), adapters_dir)
    say(f"http://{host}:{port}/  (Ctrl-C ends it)")
    launch(bank, host, port)
