"""`xfactor env`."""

from __future__ import annotations

from typing import Any

import click

from .console import json_option, print_json, say
from .help import Command

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "click", "rich")
EXTRAS = ("gguf", "gradio", "onnx", "tensorboard", "matplotlib", "trl")


@click.command("env", cls=Command, examples=["xfactor env", "xfactor env --json"])
@json_option
def command(as_json: bool) -> None:
    """Print versions and hardware, to be pasted into a bug report; no path, name or token of yours is in it."""
    found = environment()
    for label, value in found.items():
        say(f"{label + ':':21}{value}")
    if as_json:
        print_json(found)


def environment() -> dict[str, Any]:
    """What decides how a run behaves here."""
    import os
    import platform

    import psutil
    import torch

    from ..base.hardware import pick_device, pick_dtype
    from ..lowmem.memory import mib

    device = pick_device()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "xfactor-peft": _version("xfactor-peft"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "memory": f"{mib(psutil.virtual_memory().total)}, free {mib(psutil.virtual_memory().available)}",
        "device": f"{device}" + (f" ({', '.join(gpus)})" if gpus else ""),
        "auto dtype": pick_dtype("auto", device),
        **{name: _version(name) for name in PACKAGES},
        **{f"{name} (extra)": _version(name) for name in EXTRAS},
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
