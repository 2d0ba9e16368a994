"""What a GGUF file's fields say of the model, as a configuration of transformers'; every field is used or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

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
_GEMMA3_SIZES = {**_SIZES, "attention.sliding_window": "sliding_window"}
_NEEDED = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"}
_POSITIVE = {
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.factor",
}  # fmt: skip
_BASES = {"rope.freq_base", "rope.freq_base_swa"}
_ALSO = {"vocab_size", "rope.dimension_count", "rope.freq_base", "attention.value_length", "rope.scaling.type"}
_GEMMA3_ALSO = {"rope.scaling.factor", "rope.freq_base_swa", "attention.sliding_window_pattern"}
_PERIOD, _LARGEST = 6, 62
"""Gemma 3: every sixth block sees the whole text; the one with 62 blocks, 27B, has a scale of attention of its own."""
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, str]]] = {
    "gpt2": (GPT2Config, _GPT2_SIZES),
    "llama": (LlamaConfig, _SIZES),
    "qwen2": (Qwen2Config, _SIZES),
    "qwen3": (Qwen3Config, _SIZES),
    "gemma3": (Gemma3TextConfig, _GEMMA3_SIZES),
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
    if family == "gemma3":
        values |= _gemma3(fields, values)
    try:
        config = kind(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise XFactorError(f"{file.path}: its sizes do not fit together: {why}; the file is damaged") from error
    _check_shapes(file, fields)
    name = kind.__name__.removesuffix("Config").removesuffix("Text")
    config.architectures = [f"{name}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}"]
    return config


def _gemma3(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp has of Gemma 3 in its code: which blocks see a window, their positions, attention's scale."""
    whole, factor = values["rope_parameters"], _exact(fields.get("rope.scaling.factor", 1.0))
    if factor != 1:
        whole = {**whole, "rope_type": "linear", "factor": factor}
    local = {"rope_type": "default", "rope_theta": _exact(fields.get("rope.freq_base_swa", 1e4))}
    blocks, heads = values["num_hidden_layers"], values["num_attention_heads"]
    period = fields.get("attention.sliding_window_pattern", _PERIOD) if "sliding_window" in values else 1
    return {
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        "layer_types": ["sliding_attention" if i % period else "full_attention" for i in range(1, blocks + 1)],
        "query_pre_attn_scalar": values["hidden_size"] // heads if blocks == _LARGEST else values["head_dim"],
    }


def _check(file: GgufFile, fields: dict[str, Any], names: dict[str, str]) -> None:
    family = file.architecture

    def refuse(key: str, why: str) -> None:
        raise XFactorError(f"{file.path}: {family}.{key} {why}")

    for key in sorted(_NEEDED - fields.keys()):
        refuse(key, "is missing; the file is damaged")
    also = _ALSO | _GEMMA3_ALSO if family == "gemma3" else _ALSO
    scalings = ("none", "linear") if "rope.scaling.factor" in also else ("none",)
    checks: dict[str, Callable[[Any], bool]] = {
        "rope.scaling.type": lambda v: v in scalings,
        "rope.scaling.factor": lambda v: fields.get("rope.scaling.type", "linear") == "linear",
        "attention.sliding_window_pattern": lambda v: isinstance(v, int) and 0 < v < 2**24,
        "rope.dimension_count": lambda v: v == _width(fields) or family == "gpt2",
        "attention.value_length": lambda v: v == _width(fields),
    }
    for key, value in fields.items():
        if key not in names and key not in also:
            refuse(key, "is a field that is not known here, so the model would be another")
        if key in _NEEDED and not (isinstance(value, int) and 0 < value < 2**24):
            refuse(key, f"is {str(value)[:60]}, not a size of one kind for all blocks")
        if key in checks and not checks[key](value):
            refuse(key, f"is {str(value)[:60]}, which is not supported")
        if not isinstance(value, int | float | str):
            refuse(key, "is not a number or a text")
        if key in _POSITIVE and not (isinstance(value, float) and 0 < value < float("inf")):
            refuse(key, f"is {str(value)[:60]}, not a number above 0")
        if key in _BASES and value < 1:
            refuse(key, f"is {value:g}, below 1")
        if key in names and key not in _POSITIVE and not (isinstance(value, int) and 0 < value < 2**24):
            refuse(key, f"is {str(value)[:60]}, not a size")
    if fields["embedding_length"] % fields["attention.head_count"] and "attention.key_length" not in fields:
        refuse("attention.head_count", "does not divide embedding_length")


def _check_shapes(file: GgufFile, fields: dict[str, Any]) -> None:
    """Compare sizes with tensors that show them, before a model is built: a wrong one asks for any memory or time."""
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    heads = fields["attention.head_count"]
    sizes = {
        "token_embd": (1, fields["embedding_length"], "embedding_length"),
        "position_embd": (0, fields["context_length"], "context_length"),
        "blk.0.ffn_up": (0, fields["feed_forward_length"], "feed_forward_length"),
        "blk.0.attn_q": (0, heads * _width(fields), "attention.head_count"),
        "blk.0.attn_k": (0, fields.get("attention.head_count_kv", heads) * _width(fields), "attention.head_count_kv"),
    }
    wrong = ["block_count"] if len(blocks) != fields["block_count"] else []
    for name, (side, size, key) in sizes.items():
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is not None and (len(tensor.shape) != 2 or tensor.shape[side] != size):
            wrong.append(key)
    if wrong:
        key = f"{file.architecture}.{wrong[0]}"
        raise XFactorError(f"{file.path}: {key} does not fit its tensors; the file is damaged")


def _width(fields: dict[str, Any]) -> int:
    return fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])


def _exact(value: Any) -> Any:
    """A float32 as the shortest decimal that stands for it, 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
