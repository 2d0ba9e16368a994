"""llama.cpp's own server on a GGUF file with adapters loaded, through the package xllamacpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from .gguf_lora import write_lora
from .optional import need


@dataclass(frozen=True)
class Place:
    """Where the server listens, and how much it keeps in mind.

    Attributes:
        host: other addresses than the loopback let others in: there is no login.
        port: 0 takes a free one.
        context: tokens of one conversation, prompt and answer.
        parallel: conversations at the same time; more wait.
        threads: 0 takes as many as there are cores.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    context: int = 2048
    parallel: int = 1
    threads: int = 0


def write_adapters(bank: AdapterBank, folder: Path) -> dict[str, Path]:
    """Every adapter of the bank as a GGUF file in `folder`, in the bank's order.

    Raises:
        XFactorError: xllamacpp is missing, the base is no GGUF file, or an adapter has no place in a GGUF adapter.
    """
    need("xllamacpp", "serve")
    if bank.base.choice.gguf is None:
        raise XFactorError(
            f"llama.cpp runs GGUF files, and {bank.base.choice.name} is none; give the GGUF file of the same model as "
            "`model`, or export the adapter as gguf"
        )
    found = {name: folder / f"{number}.gguf" for number, name in enumerate(bank.adapters)}
    for name, path in found.items():
        write_lora(bank, Mix.of(name), path)
    return found


def start_server(file: Path, adapters: dict[str, Path], place: Place = Place()) -> Any:
    """Start the server on a GGUF model with adapters at scale 0; returns xllamacpp's `Server`, which ends with it.

    A request gives scales as `"lora": [{"id": 0, "scale": 1.0}]`, ids in the order of `adapters`; an adapter that it
    does not name is off.

    Raises:
        XFactorError: llama.cpp does not start, because the port is taken or it does not read the file.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.hostnames, parameters.port = str(file), [place.host], place.port
    parameters.n_ctx, parameters.n_parallel = place.context * place.parallel, place.parallel
    if place.threads:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = place.threads
    parameters.verbosity, parameters.lora_init_without_apply = 0, True
    # A request without scales would go on from a text that was read with the adapter of the request before.
    parameters.cache_prompt, parameters.cache_ram_mib = False, 0
    loaded = []
    for path in adapters.values():
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(path), 0.0
        loaded.append(adapter)
    parameters.lora_adapters = loaded
    try:
        return xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise XFactorError(
            f"llama.cpp does not start with {file} on {place.host}:{place.port} ({error}); is the port free?"
        ) from error
