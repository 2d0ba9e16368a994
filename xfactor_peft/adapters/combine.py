"""A weighted mix written as one adapter folder, whose update is exactly the mix's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from ..errors import XFactorError
from .adapter import AdapterInfo, find_adapter, read_adapter
from .factors import mixed_factors
from .files import WEIGHTS
from .mix import Mix
from .output import hashes, record_head, staged, write_record


def combine(mix: Mix, output: Path, root: Path = Path("adapters"), *, force: bool = False) -> dict[str, Any]:
    """Write the mix as one adapter, exactly: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], scaling 1.

    The rank of a layer is the sum of the adapters' ranks. No model is needed; R of the result is not known until it
    is measured.

    Raises:
        XFactorError: adapters for different bases, a variant of LoRA, or an output that may not be written.
    """
    infos = [read_adapter(find_adapter(name, root)) for name in mix.names]
    if not infos:
        raise XFactorError("a mix needs at least one adapter")
    first = infos[0]
    for info in infos[1:]:
        if first.identity and info.identity and first.identity.differences(info.identity):
            raise XFactorError(f"{first.name} was made for {first.identity}, {info.name} for {info.identity}")
    factors = mixed_factors(infos, [weight for _, weight in mix.parts])
    biased = any(layer.bias.any() for layer in factors.values() if layer.bias is not None)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in factors.items():
        prefix = f"base_model.model.{name}.lora_"
        tensors |= {f"{prefix}A.weight": layer.a, f"{prefix}B.weight": layer.b}
        if biased and layer.bias is not None:
            tensors[f"{prefix}B.bias"] = layer.bias
    with staged(output, force=force) as staging:
        _config({name: len(layer.a) for name, layer in factors.items()}, biased, first.config).save_pretrained(
            str(staging)
        )
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        record = _record(mix, infos, output.name, hashes(staging))
        if record:
            write_record(staging, record)
    return record


def _config(ranks: dict[str, int], biased: bool, first: dict[str, Any]) -> LoraConfig:
    """Every layer with its rank, and an alpha that makes its scaling 1."""
    patterns = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_bias=biased,
        fan_in_fan_out=bool(first.get("fan_in_fan_out")),
        base_model_name_or_path=first.get("base_model_name_or_path"),
        revision=first.get("revision"),
        inference_mode=True,
    )


def _record(mix: Mix, infos: list[AdapterInfo], name: str, files: dict[str, str]) -> dict[str, Any]:
    """What is known of a mix, the token sets of all its adapters among it; empty when its first one has no record."""
    first = infos[0].record
    if not first:
        return {}
    sources = [
        {"name": info.name, "weight": weight, "sha256": info.section("sha256").get(WEIGHTS)}
        for info, (_, weight) in zip(infos, mix.parts, strict=True)
    ]
    sets = {part["hash"]: part for info in infos for part in info.token_records}
    return {
        **record_head(name, "lora"),
        "base": first["base"],
        "tokens": next(iter(sets.values()), None),
        "target": {"kind": "mix", "goals": [{"tokens": part} for part in sets.values()]},
        "mixed_from": sources,
        "sha256": files,
    }
