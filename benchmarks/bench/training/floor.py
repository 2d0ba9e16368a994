"""The loss that no adapter inside the blocks can get below, because the final norm and the output embedding are frozen.

    floor = min over u of KL(P || softmax(W norm(u) + b))

`norm` is the model's own final norm, so h = norm(u) ranges over exactly what blocks can hand to a frozen head. Full
fine-tuning moves W as well; its floor is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from xfactor_peft.base.final_norm import final_norm
from xfactor_peft.base.split_model import split
from xfactor_peft.objective.kl import kl_loss
from xfactor_peft.objective.targets import UniformTarget

STEPS, STARTS = 200, 3


def frozen_head_floor(model: PreTrainedModel, target: UniformTarget, raised: float = 0.0) -> float | None:
    """Lowest KL found from three starts by L-BFGS, in float32; None for a model without a final norm.

    The first start is the gradient's direction at h = 0: the mean embedding of the set less that of the vocabulary.
    Adam is no good here: on a model of 576 dimensions it stopped at 1.78 where L-BFGS finds 1.39.

    Args:
        raised: a constant added to the set's logits, as by a set head.
    """
    norm, split_model = final_norm(model), split(model)
    if norm is None:
        return None
    weight = split_model.weight.detach().float()
    probabilities, mask = target.probabilities(weight.device), target.tokens.mask(weight.device)
    bias = raised * mask.float() + (0.0 if split_model.bias is None else split_model.bias.detach().float())
    direction = probabilities @ weight - weight.mean(0)
    noise = torch.randn(STARTS - 1, len(direction), generator=torch.Generator().manual_seed(0)).to(direction.device)
    starts = torch.cat([direction[None], direction + direction.norm() / len(direction) ** 0.5 * noise])
    return min(
        _descend(start, norm, lambda h: kl_loss(h, weight, probabilities, mask, bias=bias).loss) for start in starts
    )


def _descend(start: torch.Tensor, norm: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The lowest loss on the way down from a state of this direction."""
    state = nn.Parameter(F.normalize(start, dim=0) * len(start) ** 0.5)
    optimizer = torch.optim.LBFGS([state], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")
    found: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(norm(state[None].to(next(norm.parameters()).dtype)).float())
        loss.backward()
        found.append(loss.item())
        return loss

    optimizer.step(closure)
    return min(found)
