"""The norm before the output embedding: with a LayerNorm weights alone can add a constant to the logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def final_layer_norm(model: PreTrainedModel) -> nn.LayerNorm | None:
    """The LayerNorm with a bias whose output enters the output embedding, found by running two tokens.

    None where there is none, as in models with RMSNorm (Llama, Qwen, Mistral, Gemma).
    """
    outputs: dict[nn.Module, torch.Tensor] = {}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(lambda module, _, output: outputs.update({module: output})) for norm in norms]
    try:
        device = model.get_output_embeddings().weight.device
        last = model.base_model(input_ids=torch.arange(2, device=device)[None], use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    for norm in reversed(norms):
        if norm in outputs and outputs[norm].shape == last.shape and torch.equal(outputs[norm], last):
            return norm if norm.bias is not None and norm.weight is not None else None
    return None


def takes_logit_bias(model: PreTrainedModel) -> bool:
    """Whether the weights have a place for a constant on the logits: a bias of the output embedding, or a LayerNorm."""
    return getattr(model.get_output_embeddings(), "bias", None) is not None or final_layer_norm(model) is not None
