"""Which layers of a model are quantised, whoever did it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import cast

import torch

from ..lowmem.gguf_layers import GgufLinear
from ..lowmem.linears import counted, other_weights
from ..lowmem.streaming import QUANTIZED


def quantized_types() -> dict[type[torch.nn.Module], str]:
    """Types of quantised layers and what each is: this package's and, once it is imported, bitsandbytes'."""
    types: dict[type[torch.nn.Module], str] = {layer: name for name, layer in QUANTIZED.items()}
    types[GgufLinear] = "gguf"
    bitsandbytes = sys.modules.get("bitsandbytes")  # without it, no layer is of its types
    if bitsandbytes is not None:
        types |= {bitsandbytes.nn.Linear8bitLt: "int8", bitsandbytes.nn.Linear4bit: "nf4"}
    return types


def quantized_layers(model: torch.nn.Module) -> dict[str, int]:
    """How many layers of each quantised type `model` has, by the type's name, e.g. {"Int8Linear": 96}; {} for none."""
    types = quantized_types()
    return dict(Counter(type(module).__name__ for module in model.modules() if type(module) in types))


def numbers(model: torch.nn.Module) -> int:
    """How many numbers the weights of a model stand for: a 4-bit layer holds two of them in one byte."""
    types = tuple(quantized_types())
    layers = [cast(torch.nn.Linear, layer) for layer in model.modules() if isinstance(layer, types)]
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def unquantized_weights(model: torch.nn.Module) -> dict[str, int]:
    """The blocks' weights that stay as they are beside quantised layers, e.g. {"mlp.experts.down_proj": 24}."""
    names = other_weights(model, tuple(quantized_types()))
    return counted(name.removesuffix(".weight") for name in names if ".lora_" not in name)


def unquantized_share(model: torch.nn.Module) -> float:
    """Their share of the blocks' weights, counted in numbers."""
    types = tuple(quantized_types())
    left = sum(model.get_parameter(name).numel() for name in other_weights(model, types))
    layers = [cast(torch.nn.Linear, layer) for layer in model.modules() if isinstance(layer, types)]
    done = sum(layer.in_features * layer.out_features for layer in layers)
    return left / max(1, left + done)
