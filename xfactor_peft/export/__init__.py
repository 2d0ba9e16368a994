"""Adapters for other programs: a merged transformers folder, GGUF, ONNX, or a logit bias."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import XFactorError

if TYPE_CHECKING:
    from ..adapters.mix import Mix
    from ..bank.bank import AdapterBank

FORMATS = {
    "merged": "a transformers folder, for AutoModelForCausalLM and everything that reads it",
    "gguf": "the merged model as one file for llama.cpp (extra gguf)",
    "gguf-lora": "the adapter alone for llama.cpp's --lora (extra gguf)",
    "onnx": "the merged model's ids -> logits as one ONNX file (extra onnx)",
    "logit-bias": "JSON with a bias for every token of the set, for servers without LoRA",
}
_SUFFIX = {"merged": "", "gguf": ".gguf", "gguf-lora": ".gguf", "onnx": ".onnx", "logit-bias": ".json"}


def default_output(name: str, kind: str) -> Path:
    """exports/NAME-KIND, with the format's usual suffix."""
    return Path("exports") / f"{Path(name).name}-{kind}{_SUFFIX[kind]}"


def export(bank: AdapterBank, mix: Mix, kind: str, output: Path, *, force: bool = False) -> str:
    """Write `mix` (its adapters are loaded) to `output`; returns one line about what was written.

    Merged formats use the bank's base up.

    Raises:
        XFactorError: `output` exists and `force` is off, an optional package is missing, or the adapter or the
            architecture has no place in the format.
    """
    if kind != "merged" and output.exists() and not force:
        raise XFactorError(f"{output} exists; pass `force=True` to replace it, or another `output`")
    output.parent.mkdir(parents=True, exist_ok=True)
    module, function = {
        "merged": ("folder", "write_folder"),
        "gguf": ("gguf_model", "write_model"),
        "gguf-lora": ("gguf_lora", "write_lora"),
        "onnx": ("onnx_file", "write_onnx"),
        "logit-bias": ("logit_bias", "write_logit_bias"),
    }[kind]
    write: Callable[..., str] = getattr(importlib.import_module(f".{module}", __package__), function)
    return write(bank, mix, output, force=force) if kind == "merged" else write(bank, mix, output)


def need(package: str, extra: str) -> None:
    """Raises XFactorError with the command that installs an optional package."""
    if importlib.util.find_spec(package) is None:
        raise XFactorError(f'this format needs the package {package}: pip install "xfactor-peft[{extra}]"')
