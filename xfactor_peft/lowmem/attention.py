"""Causal attention with a backward pass of its own for short sequences, where torch's CPU kernel is slow.

    P = softmax(s Q K^T + causal mask),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T)),   dQ = s dS K,   dK = s dS^T Q

Forward is torch's flash kernel; backward makes P again in float32, a few heads at a time, so q, k and v are all that
is kept. Up to `LONGEST` positions this is 2 to 3 times as fast as the flash kernel's backward in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_short"
LONGEST = 256
GROUP_BYTES = 8 * 2**20


class ShortAttention(torch.autograd.Function):
    """q, k, v (B, H, T, D), all of one shape -> (B, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
        ctx.scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=ctx.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        batch, heads, length, _ = grad.shape
        wide = torch.promote_types(grad.dtype, torch.float32)
        mask = torch.full((length, length), -torch.inf, dtype=wide, device=grad.device).triu(1)
        results = [torch.empty_like(x) for x in inputs]
        group = max(1, GROUP_BYTES // (wide.itemsize * length * length))  # heads at a time
        rows, step = max(1, group // heads), min(group, heads)
        for row in range(0, batch, rows):
            for head in range(0, heads, step):
                part = slice(row, row + rows), slice(head, head + step)
                q, k, v, g = (x[part].to(wide, memory_format=torch.contiguous_format) for x in (*inputs, grad))
                shape, (q, k, v, g) = q.shape, (x.flatten(0, 1) for x in (q, k, v, g))
                p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=ctx.scaling).softmax(-1)
                ds = torch._softmax_backward_data(g @ v.transpose(1, 2), p, -1, wide).mul_(ctx.scaling)
                results[0][part] = (ds @ k).view(shape)
                results[1][part] = (ds.transpose(1, 2) @ q).view(shape)
                results[2][part] = (p.transpose(1, 2) @ g).view(shape)
        return (*results, None)


def short_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `ShortAttention` where it applies, `sdpa` for the rest."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and kwargs.get("position_bias") is None
    if not (
        plain
        and torch.is_grad_enabled()
        and query.device.type in ("cpu", "meta")
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
        and kwargs.get("softcap") is None
        and kwargs.get("cache") is None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    output = ShortAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling)
    return output.transpose(1, 2).contiguous(), None


def use_short_attention(model: PreTrainedModel) -> bool:
    """Switch a model from `sdpa` to `short_attention`; False, and no change, for one that uses something else."""
    if model.config._attn_implementation != "sdpa":
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, short_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME
