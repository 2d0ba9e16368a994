"""llama.cpp's own server on a GGUF base with adapters loaded, through the package xllamacpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.adapter import AdapterInfo
from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from .gguf_lora import write_lora
from .optional import need


def start_server(bank: AdapterBank, folder: Path, *, host: str = "127.0.0.1", port: int = 8080) -> Any:
    """Start the server with every adapter of the bank at scale 0, in the bank's order; returns xllamacpp's `Server`.

    A request gives scales as `"lora": [{"id": 0, "scale": 1.0}]`. The server ends with the object that is returned.

    Args:
        folder: where the adapters are written as GGUF files, which must stay there.

    Raises:
        XFactorError: xllamacpp is missing, the base is no GGUF file, an adapter has no place in a GGUF file, or
            llama.cpp does not start.
    """
    need("xllamacpp", "serve")
    import xllamacpp

    file = bank.base.choice.gguf
    if file is None:
        raise XFactorError(f"{bank.base.choice.name} is no GGUF file, which llama.cpp needs; give one as `model`")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.hostname, parameters.port = str(file), host, port
    loaded = []
    for number, name in enumerate(bank.adapters):
        path = folder / f"{number}.gguf"
        write_lora(bank, Mix.of(name), path)
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(path), 0.0
        loaded.append(adapter)
    parameters.lora_adapters = loaded
    try:
        return xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise XFactorError(f"llama.cpp does not start on {host}:{port}: {error}; is the port free?") from error


def dial_of(info: AdapterInfo) -> list[tuple[float, float]]:
    """(scale, R) as measured in training; [] for an adapter without a dial."""
    return [(float(scale), float(rate)) for scale, rate in info.section("rate").get("dial") or []]
