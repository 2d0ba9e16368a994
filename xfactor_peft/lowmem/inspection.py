"""What was quantised: a statement for summaries."""

from __future__ import annotations

from collections import Counter

from torch import nn

_KINDS = {"Int8Linear", "NF4Linear", "Linear8bitLt", "Linear4bit"}  # ours, and those of bitsandbytes


def quantized_layers(model: nn.Module) -> dict[str, int]:
    """How many layers of each quantised kind `model` has, by class name, e.g. {"Int8Linear": 96}; {} for none."""
    names = (type(module).__name__ for module in model.modules())
    return dict(Counter(name for name in names if name in _KINDS))
