"""What a model's config.json claims that nothing here can honour: refused by name, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..errors import XFactorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which takes seconds to import

_CLAIMS = ("quantization_config", "compression_config")
"""Keys under which a checkpoint says that its weights are codes; the second is that of older compressed-tensors."""


def check_claims(folder: Path, name: str) -> dict[str, Any]:
    """The configuration in `folder`, as it is in the file.

    Raises:
        XFactorError: it is no JSON object, or says that the weights are quantised already (GPTQ, AWQ, FP8,
            bitsandbytes, ...): read as plain numbers they would be another model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise XFactorError(f"{name}: {folder / 'config.json'} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise XFactorError(f"{name}: {folder / 'config.json'} must hold a JSON object")
    method = stored_quantisation(config)
    if method is not None:
        raise XFactorError(
            f"{name} is quantised already ({method}), which is not read here; give the unquantised model that it was "
            "made from as `model`, with `quantization=int8` or `quantization=nf4` for small memory"
        )
    return config


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Raises XFactorError for a model without attention (Mamba, RWKV): it keeps a state instead of keys and values."""
    text = config.get_text_config()
    if getattr(text, "num_attention_heads", None) is None:
        raise XFactorError(
            f"{name} is a {config.model_type} model, which has no attention heads: its state takes the place of a "
            "key-value cache, and no text can be sampled from it here; give a transformer as `model`"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raises XFactorError when the tokenizer has a token that the model has no row for, as input or as output."""
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = min(cast(torch.Tensor, side.weight).shape[0] for side in sides if side is not None)
    largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest[1] >= rows:
        raise XFactorError(
            f"{name}: the tokenizer's largest id is {largest[1]} ({largest[0]!r}), but the model has {rows} rows of "
            "embeddings; put the tokenizer that it was trained with into the folder of `model`"
        )


def stored_quantisation(config: dict[str, Any]) -> str | None:
    """How the files of a configuration are quantised, e.g. "gptq" or "bitsandbytes 4 bit"; None for plain weights.

    Also the language model's part of a configuration counts, of a model that has several.
    """
    parts = [config, *(part for key, part in sorted(config.items()) if key.endswith("config") and key not in _CLAIMS)]
    for part in parts:
        claims = (part[key] for key in _CLAIMS if part.get(key) is not None) if isinstance(part, dict) else ()
        for claim in claims:
            return _in_words(claim)
    return None


def _in_words(claim: Any) -> str:
    if not isinstance(claim, dict):
        return "by an unknown method"
    method = claim.get("quant_method") or ("bitsandbytes" if _bits(claim) else "by an unknown method")
    bits = _bits(claim)
    return f"{method} {bits} bit" if bits else str(method)


def _bits(claim: dict[str, Any]) -> int | None:
    if claim.get("load_in_8bit"):
        return 8
    if claim.get("load_in_4bit"):
        return 4
    bits = claim.get("bits")
    return bits if isinstance(bits, int) and not isinstance(bits, bool) else None
