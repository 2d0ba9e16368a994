"""Which layers of a model are quantised, whoever did it."""

from __future__ import annotations

import sys
from collections import Counter

import torch

from ..lowmem.streaming import QUANTIZED


def quantized_types() -> dict[type[torch.nn.Module], str]:
    """Types of quantised layers and what each is: this package's and, once it is imported, bitsandbytes'."""
    types: dict[type[torch.nn.Module], str] = {layer: name for name, layer in QUANTIZED.items()}
    bitsandbytes = sys.modules.get("bitsandbytes")  # without it, no layer is of its types
    if bitsandbytes is not None:
        types |= {bitsandbytes.nn.Linear8bitLt: "int8", bitsandbytes.nn.Linear4bit: "nf4"}
    return types


def quantized_layers(model: torch.nn.Module) -> dict[str, int]:
    """How many layers of each quantised type `model` has, by the type's name, e.g. {"Int8Linear": 96}; {} for none."""
    types = quantized_types()
    return dict(Counter(type(module).__name__ for module in model.modules() if type(module) in types))
