"""Fold a constant bias of the logits into an output embedding that has none, exactly, behind a LayerNorm.

A LayerNorm gives h = g * n + beta with sum_j n_j = 0, so for

    u = (1 / g) / kappa,    kappa = sum_j beta_j / g_j:          u . h = (sum_j n_j + kappa) / kappa = 1   for every h,

and  W_i' = W_i + b_i u  gives  W_i' . h = W_i . h + b_i.  Where kappa is small (in an untrained model beta is 0), beta
moves along g first, which changes kappa by D t and no direction of n:

    beta' = beta + t g,   h' = h + t g,   kappa' = kappa + D t,   W'' = W' - t (W' g) u'^T:     W'' . h' = W' . h

An RMSNorm has no such direction: nothing is constant in its output.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..base.final_norm import final_layer_norm
from ..errors import XFactorError


@torch.no_grad()
def fold_logit_bias(model: PreTrainedModel, bias: torch.Tensor) -> None:
    """Add `bias` (V,) to the logits of `model` in place, without a bias in the output embedding.

    The output embedding must not be tied to the input one, and the final norm must feed nothing else.

    Raises:
        XFactorError: the final norm is not a LayerNorm, or scales some coordinate by 0.
    """
    norm, head = final_layer_norm(model), model.get_output_embeddings()
    if norm is None:
        raise XFactorError(
            f"{type(model).__name__} has no bias in its output embedding and no LayerNorm before it, so the set head's "
            "offset has no place in its weights; keep the adapter, or export a logit bias"
        )
    g, beta = norm.weight.double(), norm.bias.double()
    if g.abs().min() < 1e-4 * g.abs().mean():
        raise XFactorError("the final norm scales a coordinate by (almost) 0, so a logit bias cannot be folded into it")
    size, weight, shift = len(g), head.weight.double(), 0.0
    kappa = float((beta / g).sum())
    if abs(kappa) < size / 2:
        shift = 1.0 if kappa >= 0 else -1.0
    u = 1 / g / (kappa + size * shift)
    weight += torch.outer(bias.double() - shift * (weight @ g), u)
    norm.bias.copy_(beta + shift * g)
    head.weight.copy_(weight)
