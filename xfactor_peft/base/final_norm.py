"""The norm before the output embedding: with a LayerNorm weights alone can add a constant to the logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm whose output enters the output embedding, found by running two tokens: what scales it by a vector.

    A LayerNorm, or an RMSNorm as in Llama, Qwen, Mistral and Gemma, whatever its class is called; None without one.
    """
    outputs: dict[nn.Module, torch.Tensor] = {}
    norms = [m for m in model.base_model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    hooks = [norm.register_forward_hook(lambda module, _, output: outputs.update({module: output})) for norm in norms]
    try:
        device = model.get_output_embeddings().weight.device
        last = model.base_model(input_ids=torch.arange(2, device=device)[None], use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return next((n for n in reversed(norms) if n in outputs and torch.equal(outputs[n], last)), None)


def final_layer_norm(model: PreTrainedModel) -> nn.LayerNorm | None:
    """The final norm where it is a LayerNorm with a bias; None for any other."""
    norm = final_norm(model)
    return norm if isinstance(norm, nn.LayerNorm) and norm.bias is not None and norm.weight is not None else None


def takes_logit_bias(model: PreTrainedModel) -> bool:
    """Whether the weights have a place for a constant on the logits: a bias of the output embedding, or a LayerNorm."""
    return getattr(model.get_output_embeddings(), "bias", None) is not None or final_layer_norm(model) is not None
