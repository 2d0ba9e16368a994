"""The loss that no adapter inside the blocks can get below, because the final norm and the output embedding are frozen.

    floor = min over u of KL(P || softmax(W norm(u) + b))

`norm` is the model's own final norm, so h = norm(u) ranges over exactly what blocks can hand to a frozen head. Full
fine-tuning moves W as well; its floor is 0.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from xfactor_peft.base.split_model import split
from xfactor_peft.objective.kl import kl_loss
from xfactor_peft.objective.targets import UniformTarget

STEPS, STARTS, RATE = 400, 3, 0.03


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The last norm outside the blocks, or None."""
    modules = model.base_model.named_modules()
    outside = [module for name, module in modules if not re.search(r"\.\d+\.", f".{name}.")]
    return next((module for module in reversed(outside) if "norm" in type(module).__name__.lower()), None)


def frozen_head_floor(model: PreTrainedModel, target: UniformTarget, raised: float = 0.0) -> float | None:
    """Lowest KL found from three starts by Adam, in float32; None for a model without a final norm.

    `raised` is a constant added to the set's logits, as by a set head.

    The first start is the gradient's direction at h = 0: the mean embedding of the set less that of the vocabulary.
    """
    norm, split_model, best = final_norm(model), split(model), float("inf")
    if norm is None:
        return None
    weight = split_model.weight.detach()
    probabilities, mask = target.probabilities(weight.device), target.tokens.mask(weight.device)
    bias = split_model.bias
    if raised:
        bias = raised * mask.to(weight.dtype) + (0 if bias is None else bias.detach())
    direction = (probabilities.to(weight.dtype) @ weight - weight.mean(0)).float()
    size = len(direction) ** 0.5
    noise = torch.randn(STARTS - 1, len(direction), generator=torch.Generator().manual_seed(0)).to(direction.device)
    states = torch.cat([direction[None], direction + direction.norm() / size * noise])
    states = nn.Parameter(F.normalize(states) * size)
    optimizer = torch.optim.Adam([states], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad(set_to_none=True)
        hidden = norm(states.to(weight.dtype))
        losses = [kl_loss(row[None], weight, probabilities, mask, bias=bias).loss for row in hidden]
        best = min(best, *(loss.item() for loss in losses))
        torch.stack(losses).sum().backward()
        optimizer.step()
    return best
