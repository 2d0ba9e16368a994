"""Adapters for other programs: a merged transformers folder, GGUF, ONNX, Ollama, or a logit bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..adapters.mix import Mix
from ..adapters.output import staged_file
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from .folder import write_folder
from .gguf_lora import write_lora
from .gguf_model import write_model
from .logit_bias import write_logit_bias
from .ollama import write_ollama
from .onnx_file import data_of, write_onnx

FOLDERS: dict[str, Callable[..., str]] = {"merged": write_folder, "ollama": write_ollama}
FILES: dict[str, tuple[str, Callable[..., str]]] = {
    "gguf": (".gguf", write_model),
    "gguf-lora": (".gguf", write_lora),
    "onnx": (".onnx", write_onnx),
    "logit-bias": (".json", write_logit_bias),
}


def default_output(name: str, kind: str) -> Path:
    """exports/NAME-KIND, with the format's usual suffix."""
    suffix = FILES[kind][0] if kind in FILES else ""
    return Path("exports") / f"{Path(name).name}-{kind}{suffix}"


def export(
    bank: AdapterBank, mix: Mix, kind: str, output: Path, *, force: bool = False, tensors: str | None = None
) -> str:
    """Write `mix` (its adapters are loaded) to `output`; returns one line about what was written.

    Merged formats consume the bank's base. `tensors` is for gguf from a GGUF base: touched tensors are packed as "f16",
    or as they were ("same"), which may round the adapter away.

    Raises:
        XFactorError: `output` exists and `force` is off, or is a folder where a file is made; an optional package is
            missing; or the adapter or the architecture has no place in the format.
    """
    if tensors is not None and (kind != "gguf" or bank.base.choice.gguf is None):
        raise XFactorError("`tensors` says how the tensors of a GGUF base are packed; it is for `format=gguf` from one")
    if kind in FOLDERS:
        return FOLDERS[kind](bank, mix, output, force=force)
    for place in [output, *([data_of(output)] if kind == "onnx" else [])]:
        if place.is_dir():
            raise XFactorError(f"{place} is a folder, and {kind} is a file; name one in it, or choose another `output`")
        if place.exists() and not force:
            raise XFactorError(f"{place} exists; pass `force=True` to replace it, or another `output`")
    with staged_file(output) as path:
        more = {} if tensors is None else {"tensors": tensors}
        return FILES[kind][1](bank, mix, path, **more).replace(str(path), str(output))
