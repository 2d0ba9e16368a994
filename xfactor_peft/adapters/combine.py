"""Weighted mixes as adapter folders of their own, and what two adapters have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from ..errors import XFactorError
from .adapter import AdapterInfo, find_adapter, layers_of, read_adapter
from .files import WEIGHTS
from .mix import Mix
from .output import hashes, prepare_output, publish, write_record


@dataclass(frozen=True)
class Factors:
    """One layer's update: scaling * B A, and scaling * bias of lora_B."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float


def read_factors(info: AdapterInfo) -> dict[str, Factors]:
    """Layer name -> factors, float32.

    Raises:
        XFactorError: the adapter is a variant of LoRA (DoRA) whose update is not scaling * B A.
    """
    if info.config.get("use_dora"):
        raise XFactorError(f"adapter {info.name} is DoRA, whose update is not a product of two factors")
    tensors, found = load_file(info.folder / WEIGHTS), {}
    for name in sorted(layers_of(info)):
        prefix = f"base_model.model.{name}.lora_"
        a, b = tensors[f"{prefix}A.weight"].float(), tensors[f"{prefix}B.weight"].float()
        bias = tensors.get(f"{prefix}B.bias")
        found[name] = Factors(a, b, None if bias is None else bias.float(), layer_scaling(info.config, name, len(a)))
    return found


def layer_scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), after PEFT's pattern for the layer."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def mixed_factors(infos: list[AdapterInfo], weights: list[float]) -> dict[str, Factors]:
    """sum_i w_i s_i B_i A_i of every layer as factors with scaling 1, and the sum of the biases (0 without one).

    Raises:
        XFactorError: an adapter is a variant of LoRA.
    """
    parts, mixed = [read_factors(info) for info in infos], {}
    for name in sorted({name for part in parts for name in part}):
        held = [(w * part[name].scaling, part[name]) for w, part in zip(weights, parts, strict=True) if name in part]
        biases = [scale * factors.bias for scale, factors in held if factors.bias is not None]
        mixed[name] = Factors(
            torch.cat([factors.a for _, factors in held]).contiguous(),
            torch.cat([scale * factors.b for scale, factors in held], dim=1).contiguous(),
            sum(biases, torch.zeros(len(held[0][1].b))),
            1.0,
        )
    return mixed


def combine(mix: Mix, output: Path, root: Path = Path("adapters"), *, force: bool = False) -> dict[str, Any]:
    """Write the mix as one adapter, exactly: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], scaling 1.

    The rank of a layer is the sum of the adapters' ranks. No model is needed; R of the result is not known until it
    is measured (`xfactor eval`).

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
    tensors, ranks = {}, {}
    for name, factors in mixed_factors(infos, [weight for _, weight in mix.parts]).items():
        prefix = f"base_model.model.{name}.lora_"
        tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = factors.a, factors.b
        if factors.bias is not None:
            tensors[f"{prefix}B.bias"] = factors.bias
        ranks[name] = len(factors.a)
    biased = any(value.any() for key, value in tensors.items() if key.endswith("B.bias"))
    if not biased:
        tensors = {key: value for key, value in tensors.items() if not key.endswith("B.bias")}
    patterns = {rf"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_bias=biased,
        fan_in_fan_out=bool(first.config.get("fan_in_fan_out")),
        base_model_name_or_path=first.config.get("base_model_name_or_path"),
        inference_mode=True,
    )
    staging = prepare_output(output, force=force)
    config.save_pretrained(str(staging))
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
    record = _record(mix, infos, output.name, hashes(staging))
    if record:
        write_record(staging, record)
    publish(staging, output)
    return record


def _record(mix: Mix, infos: list[AdapterInfo], name: str, files: dict[str, str]) -> dict[str, Any]:
    """What is known of a mix; empty when its first adapter has no record."""
    first = infos[0].record
    if not first:
        return {}
    sources = [
        {"name": info.name, "weight": weight, "sha256": info.record.get("sha256", {}).get(WEIGHTS)}
        for info, (_, weight) in zip(infos, mix.parts, strict=True)
    ]
    return {
        "format": 1,
        "name": name,
        "kind": "lora",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "peft")},
        "base": first["base"],
        "tokens": first["tokens"],
        "mixed_from": sources,
        "sha256": files,
    }


@dataclass(frozen=True)
class Comparison:
    """Two adapters side by side.

    Attributes:
        settings: label -> the two values, where they differ.
        layers: name -> Frobenius norms of both updates and their cosine; a norm is 0 for an adapter without the layer.
        cosine: of the updates as a whole, <D1, D2> / (|D1| |D2|) over all layers.
    """

    settings: dict[str, tuple[Any, Any]]
    layers: dict[str, tuple[float, float, float]]
    cosine: float


def compare(first: AdapterInfo, second: AdapterInfo) -> Comparison:
    """Settings and updates; a product <s B A, s' B' A'> = s s' tr((A' A^T)(B^T B')) never makes a whole matrix."""
    from .catalogue import facts

    one, two = facts(first), facts(second)
    skipped = {"folder", "created", "sha256"}
    settings = {
        label: (one.get(label), two.get(label))
        for label in dict.fromkeys([*one, *two])
        if label not in skipped and one.get(label) != two.get(label)
    }
    parts, layers, sums = (read_factors(first), read_factors(second)), {}, [0.0, 0.0, 0.0]
    for name in sorted({*parts[0], *parts[1]}):
        mine, other = (part.get(name) for part in parts)
        products = (_inner(mine, mine), _inner(other, other), _inner(mine, other))
        sums = [total + value for total, value in zip(sums, products, strict=True)]
        layers[name] = (math.sqrt(products[0]), math.sqrt(products[1]), _cosine(*products))
    return Comparison(settings, layers, _cosine(*sums))


def _inner(one: Factors | None, two: Factors | None) -> float:
    if one is None or two is None:
        return 0.0
    product = ((two.a @ one.a.T) * (two.b.T @ one.b)).sum() * one.scaling * two.scaling
    if one.bias is not None and two.bias is not None:
        product += (one.bias @ two.bias) * one.scaling * two.scaling
    return float(product)


def _cosine(first: float, second: float, inner: float) -> float:
    return inner / math.sqrt(first * second) if first * second > 0 else 0.0
