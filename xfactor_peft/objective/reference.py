"""Eager twins of the fused paths: test oracles and benchmark baselines, written to be read."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def kl_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean D_KL(P || softmax(W h + b)) over positions, through the whole (B*T) x V tensor.

    Shapes and meaning as in `kl.kl_loss`. `F.kl_div(input=log q, target=p)` is KL(p || q);
    `batchmean` divides the sum by the number of positions.
    """
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    loss = F.kl_div(log_q, target.to(log_q.dtype).expand_as(log_q), reduction="batchmean")
    return loss, log_q.detach().exp()[:, mask].sum(-1).mean()


def tilted_kl_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor],
    members: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    set_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean D_KL(tilted base || student) through whole tensors of logits; as `kl.tilted_kl_loss`."""
    states, tilt = teacher
    logits = F.linear(hidden, weight, bias)
    if set_logits is not None:
        logits = logits + set_logits @ members.to(set_logits.dtype)
    log_q = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    log_p = (F.linear(states, weight, bias).to(log_q.dtype) + tilt).log_softmax(dim=-1)
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return loss, (log_q.detach().exp() @ members.T.to(log_q.dtype)).mean(0)
