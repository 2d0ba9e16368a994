"""What PEFT wraps, with types: it declares a wrapped model and the sides of a LoRA layer as any nn.Module."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:  # neither is needed at run time by those who train without PEFT
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer, LoraModel
    from transformers import PreTrainedModel


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, or the model itself."""
    return cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())


def tuner(model: PeftModel) -> LoraModel:
    """What PEFT's wrapper hands most of its calls to."""
    return cast("LoraModel", model.base_model)


def side_a(layer: LoraLayer, adapter: str) -> nn.Linear:
    """A as a linear layer, (r, in), of an adapter on nn.Linear or Conv1D."""
    return cast(nn.Linear, layer.lora_A[adapter])


def side_b(layer: LoraLayer, adapter: str) -> nn.Linear:
    """B as a linear layer, (out, r); it has a bias only with `lora_bias`."""
    return cast(nn.Linear, layer.lora_B[adapter])
