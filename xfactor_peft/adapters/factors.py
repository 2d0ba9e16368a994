"""An adapter's update of each layer as factors, s B A: read from its files, and added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from ..errors import XFactorError
from .adapter import AdapterInfo, layers_of
from .config import layer_scaling
from .files import WEIGHTS


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
        XFactorError: the adapter is a variant of LoRA (DoRA) whose update is not scaling * B A, or a side is missing.
    """
    if info.config.get("use_dora"):
        raise XFactorError(f"adapter {info.name} is DoRA, whose update is not a product of two factors")
    tensors, found = load_file(info.folder / WEIGHTS), {}
    for name in sorted(layers_of(info)):
        a, b, bias = (
            tensors.get(f"base_model.model.{name}.lora_{part}") for part in ("A.weight", "B.weight", "B.bias")
        )
        if a is None or b is None or not (a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0):
            raise XFactorError(f"adapter {info.name} is damaged: {name} has no A and B of one rank")
        if bias is not None and bias.shape != b.shape[:1]:
            raise XFactorError(f"adapter {info.name} is damaged: the bias of {name} has shape {tuple(bias.shape)}")
        scaling = layer_scaling(info.config, name, len(a))
        found[name] = Factors(a.float(), b.float(), None if bias is None else bias.float(), scaling)
    return found


def read_all(infos: list[AdapterInfo]) -> list[dict[str, Factors]]:
    """The factors of several adapters; raises XFactorError where their updates of a layer differ in size."""
    parts = [read_factors(info) for info in infos]
    sizes: dict[str, tuple[int, int]] = {}
    for info, part in zip(infos, parts, strict=True):
        for name, layer in part.items():
            size = (len(layer.b), layer.a.shape[1])
            if sizes.setdefault(name, size) != size:
                raise XFactorError(f"{infos[0].name} and {info.name} are for bases of different sizes, see {name}")
    return parts


def mixed_factors(infos: list[AdapterInfo], weights: list[float]) -> dict[str, Factors]:
    """sum_i w_i s_i B_i A_i of every layer as factors with scaling 1, and the sum of the biases (0 without one).

    Raises:
        XFactorError: an adapter is a variant of LoRA or damaged, or they are for bases of different sizes.
    """
    parts, mixed = read_all(infos), {}
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
