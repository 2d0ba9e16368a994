"""What a model's config.json claims about its files that no loader here can honour: refused by name, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import XFactorError

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
