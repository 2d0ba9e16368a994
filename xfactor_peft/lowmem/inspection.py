"""What was quantised: a statement for summaries."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .quantized import QuantizedLinear


def quantized_layers(model: nn.Module) -> dict[str, int]:
    """How many layers of each quantised kind `model` has, by class name, e.g. {"Int8Linear": 96}; {} for none."""
    return dict(Counter(type(m).__name__ for m in model.modules() if isinstance(m, QuantizedLinear)))
