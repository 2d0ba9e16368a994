"""Merge adapters into the base's weights: an ordinary transformers model without PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..adapters.mix import Mix
from ..base.final_norm import takes_logit_bias
from ..errors import XFactorError, first_line
from ..lowmem.peft_parts import side_b, tuner
from .bank import AdapterBank
from .norm_fold import fold_logit_bias
from .state_fold import fold_by_states


@torch.no_grad()
def merge(
    bank: AdapterBank, what: str | Mix, scale: float = 1.0, tell: Callable[[str], None] = lambda _: None
) -> PreTrainedModel:
    """W + sum_i w_i s_i B_i A_i, in place; the bank's base is consumed, and the plain model is returned.

    Tied embeddings stay tied unless an adapter has a set head: the output embedding then becomes a separate tensor
    (`tie_word_embeddings=False`), and the head's constant offset goes into its bias or, without one, into the final
    LayerNorm (see `norm_fold`); behind an RMSNorm into the output embedding, nearly (see `state_fold`), and `tell` is
    given a line about what was lost. So an adapter of a quantised run merges into the base loaded without quantisation.

    Raises:
        XFactorError: the base is quantised, an adapter is not loaded, or an offset has no place in the model.
    """
    if bank.base.quantized:
        raise XFactorError("merging into quantised weights would round the adapter away; load the base unquantised")
    bank.use(what, scale)
    mix, model = bank.active, bank.base.model
    peft_names = [bank.peft_names[name] for name, weight in mix.parts if weight != 0]
    layer = model.get_output_embeddings()
    bias, offset, direction = None, None, None
    if isinstance(layer, PeftLinear) and any(peft_name in layer.lora_A for peft_name in peft_names):
        offset = _offset(layer, peft_names)
        if offset is not None and not takes_logit_bias(model):
            fold = fold_by_states(bank.base, offset)
            direction = fold.direction
            tell(fold.describe())
        bias = _merge_head(model, layer, peft_names, offset)
    if bank.wrapped is not None:
        _drop_zero_biases(model, peft_names)
        lora = tuner(bank.wrapped)
        try:
            merged = lora.merge_and_unload(safe_merge=True, adapter_names=peft_names) if peft_names else lora.unload()
            model = cast(PreTrainedModel, merged)
        except (ValueError, RuntimeError) as error:
            raise XFactorError(f"{mix} cannot be merged: {first_line(error)}") from error
    if bias is not None and direction is not None:
        weight, rows = model.get_output_embeddings().weight, bias.nonzero().flatten()
        update = torch.outer(bias[rows].double(), direction.to(bias.device))
        weight[rows] = (weight[rows].double() + update).to(weight.dtype)
    elif bias is not None:
        fold_logit_bias(model, bias)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _merge_head(
    model: PreTrainedModel, layer: PeftLinear, peft_names: list[str], offset: torch.Tensor | None
) -> torch.Tensor | None:
    """Merge the set heads into a separate output embedding; returns their `offset` (V,) where that has no bias."""
    base = cast(nn.Linear, layer.base_layer)
    weight, dtype = base.weight.float().clone(), base.weight.dtype
    for peft_name in peft_names:
        if peft_name in layer.lora_variant:
            weight = layer.lora_variant[peft_name].merge_safe(layer, peft_name, weight)
        elif peft_name in layer.lora_A:
            weight += layer.get_delta_weight(peft_name).float()
    base.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    model.set_output_embeddings(base)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    if offset is not None and base.bias is not None:
        base.bias.add_(offset.to(base.bias))
        return None
    return offset


def _offset(layer: PeftLinear, peft_names: list[str]) -> torch.Tensor | None:
    """The constant that the set heads add to the logits, (V,); None where it is 0."""
    offset = None
    for peft_name in peft_names:
        bias = side_b(layer, peft_name).bias if peft_name in layer.lora_A else None
        if bias is not None and bias.any():
            offset = bias * layer.scaling[peft_name] + (0 if offset is None else offset)
    return offset


def _drop_zero_biases(model: PreTrainedModel, peft_names: list[str]) -> None:
    """Biases of lora_B that are 0 need no bias in the base (`lora_bias` is one switch for all layers of an adapter)."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for peft_name in peft_names:
            if peft_name in layer.lora_B and layer.lora_bias[peft_name] and not side_b(layer, peft_name).bias.any():
                layer.lora_bias[peft_name] = False
