"""Optimisers by name: Adam, and two that need less memory for the same parameters.

Bytes of state a parameter: Adam and AdamW 8, `adam8bit` 2, `adafactor` next to none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import XFactorError
from ..lowmem.imports import allow_bitsandbytes
from ..options import OPTIMIZERS

LR_RATIO = "lr_ratio"
"""Name of the attribute that gives a parameter a learning rate of its own."""


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The optimiser called `name`.

    - "adam", "adamw": Kingma and Ba 2014, and Loshchilov and Hutter 2019 (decay separate from the gradient); fused.
    - "adam8bit": Adam with both moments in blocks of 8-bit codes, from bitsandbytes (Dettmers et al. 2021,
      arXiv:2110.02861). On a CPU it dequantises a whole parameter's moments at a time, so a large embedding costs a
      few times its own size for a moment, and steps are slow.
    - "adafactor": one mean a row and one a column in place of second moments, no first moment (Shazeer and Stern 2018,
      arXiv:1804.04235), from torch. Its `lr` is relative: a step moves an entry by about
      min(lr, 1/sqrt(step)) * RMS(parameter).

    A parameter with an attribute `LR_RATIO` learns at so many times `lr` (LoRA+).

    Raises:
        XFactorError: an unknown name.
    """
    groups = _groups(parameters, lr)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "adam8bit":
        allow_bitsandbytes()
        from bitsandbytes.optim import Adam8bit

        return Adam8bit(groups, lr=lr, weight_decay=weight_decay)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=weight_decay, foreach=False)
    raise XFactorError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}; got {name!r}")


def _groups(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, LR_RATIO, 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * ratio} for ratio, members in groups.items()]
