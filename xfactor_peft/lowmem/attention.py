"""Causal attention where torch's CPU kernel is slow: for short sequences in training, and for one token in decoding.

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
DECODE_BYTES = 4 * 2**20
"""Size of the float32 keys of the sequences that one token each is decoded of at once."""


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


def last_token_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """softmax(s q K^T) V of one query a sequence, which sees every key; (B, H, 1, D), (B, G, T, D) twice -> q's shape.

    H / G heads share their keys and values. For one query torch's CPU flash kernel takes 1.5 to 10 times as long in
    bf16 (in float32 it does not); like it, this computes in float32 and rounds once.
    """
    batch, groups, length, width = k.shape
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    shared = q.reshape(batch, groups, -1, width)
    output = torch.empty(*shared.shape[:3], v.shape[3], dtype=v.dtype)
    step = max(1, DECODE_BYTES // (4 * groups * length * width))
    for part in (slice(start, start + step) for start in range(0, batch, step)):
        p = torch.matmul(shared[part].float(), k[part].float().transpose(2, 3)).mul_(scale).softmax(-1)
        output[part] = torch.matmul(p, v[part].float())
    return output.view(batch, q.shape[1], 1, v.shape[3])


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
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    plain = attention_mask is None and causal and not dropout and not unusual
    one = query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if plain and one and not torch.is_grad_enabled():
        return last_token_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
    if not (
        plain
        and torch.is_grad_enabled()
        and query.device.type in ("cpu", "meta")
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
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
