"""Training and running a causal language model on a small machine: frozen layers, streamed loading, lean activations.

    model = load_streaming(folder, dtype=torch.bfloat16, quantization="int8")
    config._register_custom_module(custom_modules())      # a peft.LoraConfig
    model = get_peft_model(model, config)
    prepare_for_training(model, checkpointing=True)

Everything here works on any device; the fast paths are those of x86 CPUs with VNNI or AMX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import prepare_for_training as prepare_for_training
    from .inspection import quantized_layers as quantized_layers
    from .int8 import Int8Linear as Int8Linear
    from .nf4 import NF4Linear as NF4Linear
    from .peft_layers import custom_modules as custom_modules
    from .streaming import UnsupportedCheckpoint as UnsupportedCheckpoint
    from .streaming import load_streaming as load_streaming
    from .streaming import quantize_linears as quantize_linears

_HOME = {
    "Int8Linear": "int8",
    "NF4Linear": "nf4",
    "UnsupportedCheckpoint": "streaming",
    "custom_modules": "peft_layers",
    "load_streaming": "streaming",
    "prepare_for_training": "activations",
    "quantize_linears": "streaming",
    "quantized_layers": "inspection",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
