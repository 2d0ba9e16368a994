"""`xfactor serve`."""

from __future__ import annotations

import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from .common import adapters_dir_option, base_options, load, own_base
from .console import say
from .help import Command
from .values import ADAPTER


@click.command(
    "serve",
    cls=Command,
    first=("model", "adapters_dir", "port", "context", "parallel"),
    examples=["xfactor serve x", "xfactor serve x rate --model model.Q4_K_M.gguf --port 8081"],
)
@click.argument("adapters", nargs=-1, required=True, type=ADAPTER, metavar="NAME...")
@adapters_dir_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Other addresses let others in: there is no login."
)
@click.option("--port", default=8080, show_default=True, help="0 takes a free one.")
@click.option("--context", default=2048, show_default=True, help="Tokens of one conversation.")
@click.option("--parallel", default=1, show_default=True, help="Conversations at the same time.")
@click.option("--threads", default=0, show_default=True, help="0: one for each core.")
@base_options
def command(adapters: tuple[str, ...], adapters_dir: Path, **flags: Any) -> None:
    """Serve adapters on their GGUF file with llama.cpp: OpenAI-compatible, a scale per adapter in every request."""
    from ..bank.bank import AdapterBank
    from ..export.serving import Place, start_server, write_adapters

    place = Place(**{name: flags.pop(name) for name in Place.__dataclass_fields__})
    bank = AdapterBank(load(own_base(flags, adapters, adapters_dir)), adapters_dir)
    for name in adapters:
        bank.load(name)
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        files, model, infos = write_adapters(bank, Path(folder)), bank.base.choice.gguf, bank.adapters
        del bank  # llama.cpp reads the file anew
        assert model is not None
        server = start_server(model, files, place)
        say(f"{server.listening_address}/v1 answers as OpenAI's does; Ctrl-C ends it")
        say("An adapter is off unless a request gives its scale:")
        for number, (name, info) in enumerate(infos.items()):
            say(f'  {name}: "lora": [{{"id": {number}, "scale": 1.0}}]')
            for scale, rate in info.section("rate").get("dial") or []:
                say(f"    R {rate:7.4f}   at scale {scale:.2f}")
        asked = '{"messages": [{"role": "user", "content": "Hello"}], "lora": [{"id": 0, "scale": 1.0}]}'
        say(f"curl {server.listening_address}/v1/chat/completions -d '{asked}'")
        threading.Event().wait()
