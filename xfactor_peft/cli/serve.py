"""`xfactor serve`."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import click

from .common import adapters_dir_option, load, model_options, own_base
from .console import say


@click.command("serve")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@adapters_dir_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Other addresses let others in: there is no login."
)
@click.option("--port", default=8080, show_default=True)
@model_options
def command(adapters: tuple[str, ...], adapters_dir: Path, host: str, port: int, **flags: Any) -> None:
    """Serve adapters and their GGUF base with llama.cpp, OpenAI-compatible, a scale per adapter and request."""
    from ..bank.bank import AdapterBank
    from ..export.serving import dial_of, start_server

    bank = AdapterBank(load(own_base(flags, adapters[0], adapters_dir)), adapters_dir)
    for name in adapters:
        bank.load(name)
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(bank, Path(folder), host=host, port=port)
        say(f"{server.listening_address}/v1  (Ctrl-C ends it); adapters are off unless a request gives their scale:")
        for number, (name, info) in enumerate(bank.adapters.items()):
            dial = ", ".join(f"R {rate:.3g} at scale {scale:.3g}" for scale, rate in dial_of(info))
            say(f'  {name}: "lora": [{{"id": {number}, "scale": 1.0}}]' + (f"; {dial}" if dial else ""))
        call = '{"messages": [{"role": "user", "content": "Hello"}], "lora": [{"id": 0, "scale": 1.0}]}'
        say(f"curl {server.listening_address}/v1/chat/completions -d '{call}'")
        threading.Event().wait()
