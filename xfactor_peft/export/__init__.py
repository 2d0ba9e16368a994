"""Adapters for other programs: a merged transformers folder, GGUF, ONNX, or a logit bias."""

from __future__ import annotations

from pathlib import Path

from ..adapters.mix import Mix
from ..adapters.output import staged_file
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from .folder import write_folder
from .gguf_lora import write_lora
from .gguf_model import write_model
from .logit_bias import write_logit_bias
from .onnx_file import write_onnx

FORMATS = {
    "merged": "a transformers folder, for AutoModelForCausalLM and everything that reads it",
    "gguf": "the merged model as one file for llama.cpp (extra gguf)",
    "gguf-lora": "the adapter alone for llama.cpp's `--lora` (extra gguf)",
    "onnx": "the merged model's ids -> logits as one ONNX file (extra onnx)",
    "logit-bias": "JSON with a bias for every token of the set, for servers without LoRA",
}
_FILES = {
    "gguf": (".gguf", write_model),
    "gguf-lora": (".gguf", write_lora),
    "onnx": (".onnx", write_onnx),
    "logit-bias": (".json", write_logit_bias),
}


def default_output(name: str, kind: str) -> Path:
    """exports/NAME-KIND, with the format's usual suffix."""
    suffix = _FILES[kind][0] if kind in _FILES else ""
    return Path("exports") / f"{Path(name).name}-{kind}{suffix}"


def export(bank: AdapterBank, mix: Mix, kind: str, output: Path, *, force: bool = False) -> str:
    """Write `mix` (its adapters are loaded) to `output`; returns one line about what was written.

    Merged formats consume the bank's base.

    Raises:
        XFactorError: `output` exists and `force` is off, an optional package is missing, or the adapter or the
            architecture has no place in the format.
    """
    if kind == "merged":
        return write_folder(bank, mix, output, force=force)
    if output.exists() and not force:
        raise XFactorError(f"{output} exists; pass `force=True` to replace it, or another `output`")
    with staged_file(output) as path:
        return _FILES[kind][1](bank, mix, path).replace(str(path), str(output))
