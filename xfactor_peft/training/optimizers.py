"""Optimisers by name: Adam, and two that need less memory for the same parameters.

Bytes of state a parameter: Adam and AdamW 8, `adam8bit` 2, `adafactor` next to none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from ..errors import XFactorError
from ..lowmem.imports import allow_bitsandbytes
from ..options import OPTIMIZERS

B_RATIO = 16.0
"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): how much faster B learns than A, as its authors recommend."""


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    *,
    lora_plus: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """The optimiser called `name`.

    - "adam", "adamw": Kingma and Ba 2014, and Loshchilov and Hutter 2019 (decay separate from the gradient); fused.
    - "adam8bit": Adam with both moments in blocks of 8-bit codes, from bitsandbytes (Dettmers et al. 2021,
      arXiv:2110.02861). On a CPU it dequantises a whole parameter's moments at a time, so a large embedding costs a
      few times its own size for a moment, and steps are slow.
    - "adafactor": one mean a row and one a column in place of second moments, no first moment (Shazeer and Stern 2018,
      arXiv:1804.04235), from torch. Its `lr` is relative: a step moves an entry by about
      min(lr, 1/sqrt(step)) * RMS(parameter).

    Args:
        lora_plus: the module that the parameters belong to, when its LoRA B is to learn `B_RATIO` times as fast.

    Raises:
        XFactorError: an unknown name.
    """
    kind, settings = _kind(name)
    if lora_plus is not None:
        return create_loraplus_optimizer(
            cast(PeftModel, lora_plus), kind,
            lr=lr, loraplus_lr_ratio=B_RATIO, loraplus_weight_decay=weight_decay, **settings,
        )  # fmt: skip
    return kind(parameters, lr=lr, weight_decay=weight_decay, **settings)


def _kind(name: str) -> tuple[Any, dict[str, Any]]:
    """(the class, its own settings)."""
    if name == "adam":
        return torch.optim.Adam, {"fused": True}
    if name == "adamw":
        return torch.optim.AdamW, {"fused": True}
    if name == "adam8bit":
        allow_bitsandbytes()
        from bitsandbytes.optim import Adam8bit

        return Adam8bit, {}
    if name == "adafactor":
        return torch.optim.Adafactor, {"foreach": False}
    raise XFactorError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
