"""A frozen linear layer with LoRA as one autograd function, which saves x once and nothing that belongs to the weight.

    y  = x W^T + b + s h B^T                     h = x A^T,  (M, r)
    dx = g W + s (g B) A                         g = dy
    dA = s (g B)^T x,   dB = s g^T h,   db = sum of g

x (M, in), W (out, in), A (r, in), B (out, r). Autograd's own version of this keeps x two or three times (for A, for
its conversion to the adapter's dtype, for dropout) and a dequantised W. LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class FrozenWeight(Protocol):
    """How the weight of a frozen layer multiplies; `out` (M, ...) may be written to and is then returned."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b; (M, in) -> (M, out), in x's dtype."""

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """g W; (M, out) -> (M, in), in g's dtype."""


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, lora_a, lora_b, weight: FrozenWeight, scaling: float):
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        flat = x.reshape(-1, x.shape[-1])
        y = weight.product(flat, None if bias is None else bias.to(x.dtype))
        if lora_a is None:
            ctx.save_for_backward(None, None, None, None)
        else:
            h = flat @ lora_a.to(x.dtype).T
            y.addmm_(h, lora_b.to(x.dtype).T, alpha=scaling)
            wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            ctx.save_for_backward(flat if wanted else None, h if wanted else None, lora_a, lora_b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, h, lora_a, lora_b = ctx.saved_tensors
        want_x, want_bias, want_a, want_b = ctx.needs_input_grad[:4]
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = grad_a = grad_b = grad_h = None
        if lora_a is not None and (want_x or want_a):
            grad_h = (g @ lora_b.to(g.dtype)).mul_(ctx.scaling)
        if want_a:
            grad_a = (grad_h.T @ x).to(lora_a.dtype)
        if want_b:
            grad_b = (g.T @ h).to(lora_b.dtype).mul_(ctx.scaling)
        if want_x:
            grad_x = ctx.weight.transposed_product(g)
            if grad_h is not None:
                grad_x.addmm_(grad_h, lora_a.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        if want_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_bias, grad_a, grad_b, None, None


def frozen_linear(
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """y = x W^T + b + scaling (x A^T) B^T; (..., in) -> (..., out), in x's dtype (autocast's under autocast).

    A and B may be of a higher precision than x: they are converted inside, and their gradients come in their own
    dtype. Differentiable once, for x, b, A and B; W is constant.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _FrozenLinear.apply(x, bias, lora_a, lora_b, weight, scaling)
    return _FrozenLinear.apply(x, bias, lora_a, lora_b, weight, scaling)
