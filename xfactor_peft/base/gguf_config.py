"""What a GGUF file's fields say of the model, as a configuration of transformers'; every field is used or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from ..errors import XFactorError
from ..lowmem.gguf_file import GgufFile

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_NEEDED = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"}
_POSITIVE = {"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"}
_ALSO = {"vocab_size", "rope.dimension_count", "rope.freq_base", "attention.value_length", "rope.scaling.type"}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, str]]] = {
    "gpt2": (GPT2Config, _GPT2_SIZES),
    "llama": (LlamaConfig, _SIZES),
    "qwen2": (Qwen2Config, _SIZES),
    "qwen3": (Qwen3Config, _SIZES),
}
"""ggml's architectures that are read, with their sizes' names here. Mistral's files call themselves llama."""


def config_of(file: GgufFile) -> PretrainedConfig:
    """The configuration.

    Raises:
        XFactorError: another architecture, or a field that is missing, of another kind or not known here.
    """
    family = file.architecture
    if family not in FAMILIES:
        raise XFactorError(f"{file.path} is a {family} model; GGUF files are read of {', '.join(FAMILIES)}")
    kind, names = FAMILIES[family]
    fields = {key.removeprefix(f"{family}."): v for key, v in file.fields.items() if key.startswith(f"{family}.")}
    _check(file, fields, names)
    values = {names[key]: _exact(value) for key, value in fields.items() if key in names}
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else None
    if rows is None or fields.get("vocab_size", rows) != rows:
        raise XFactorError(f"{file.path} has no token_embd.weight of {fields.get('vocab_size')} rows; it is damaged")
    values |= {"vocab_size": rows, "tie_word_embeddings": "output.weight" not in file.tensors}
    for name in ("bos", "eos"):
        values[f"{name}_token_id"] = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    if family != "gpt2":
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": _exact(fields.get("rope.freq_base", 1e4))}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // max(1, values["num_attention_heads"]))
    if family == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    config = kind(**values)
    config.architectures = [
        f"{kind.__name__.removesuffix('Config')}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}"
    ]
    return config


def _check(file: GgufFile, fields: dict[str, Any], names: dict[str, str]) -> None:
    family = file.architecture

    def refuse(key: str, why: str) -> None:
        raise XFactorError(f"{file.path}: {family}.{key} {why}")

    for key in sorted(_NEEDED - fields.keys()):
        refuse(key, "is missing; the file is damaged")
    checks: dict[str, Callable[[Any], bool]] = {
        "rope.scaling.type": lambda v: v == "none",
        "rope.dimension_count": lambda v: v == _width(fields) or family == "gpt2",
        "attention.value_length": lambda v: v == _width(fields),
    }
    for key, value in fields.items():
        if key not in names and key not in _ALSO:
            refuse(key, "is a field that is not known here, so the model would be another")
        if key in _NEEDED and not (isinstance(value, int) and 0 < value < 2**24):
            refuse(key, f"is {str(value)[:60]}, not a size of one kind for all blocks")
        if key in checks and not checks[key](value):
            refuse(key, f"is {str(value)[:60]}, which is not supported")
        if not isinstance(value, int | float | str):
            refuse(key, "is not a number or a text")
        if key in _POSITIVE and not (isinstance(value, float) and 0 < value < float("inf")):
            refuse(key, f"is {str(value)[:60]}, not a number above 0")
        if key in names and key not in _POSITIVE and not (isinstance(value, int) and 0 < value < 2**24):
            refuse(key, f"is {str(value)[:60]}, not a size")
    if fields["embedding_length"] % fields["attention.head_count"] and "attention.key_length" not in fields:
        refuse("attention.head_count", "does not divide embedding_length")


def _width(fields: dict[str, Any]) -> int:
    return fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])


def _exact(value: Any) -> Any:
    """A float32 as the shortest decimal that stands for it, 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
