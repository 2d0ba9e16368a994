"""What the 8-bit and the 4-bit layer share: a frozen nn.Linear whose weight is stored in fewer bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from .fused_lora import frozen_linear


class QuantizedLinear(nn.Linear):
    """y = x W^T + b with W frozen and quantised; a `FrozenWeight`.

    It is an nn.Linear so that PEFT and transformers see a linear layer, but its `weight` holds codes. The scales stay
    float32 whatever dtype the module is converted to.

    Attributes:
        from_conv1d: the layer replaces GPT-2's Conv1D, whose weight was (in, out). Adapter configurations say
            `fan_in_fan_out` for such layers.
    """

    scale_name: str
    """Name of the buffer with the float32 scales."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *, from_conv1d: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.from_conv1d = in_features, out_features, from_conv1d
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self._allocate()

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, *, from_conv1d: bool = False) -> Self:
        """Quantise `weight`, (out, in); the bias is kept as it is."""
        layer = cls(weight.shape[1], weight.shape[0], False, from_conv1d=from_conv1d)
        layer.quantize_(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @abstractmethod
    def _allocate(self) -> None:
        """Register the codes as parameter `weight` and the scales as a buffer, uninitialised."""

    @abstractmethod
    def quantize_(self, weight: torch.Tensor) -> None:
        """Overwrite codes and scales with those of `weight`, (out, in)."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W as a new tensor (out, in)."""

    @abstractmethod
    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        """x W^T, or addend + x W^T in the storage of `addend`; (M, in) -> (M, out)."""

    @abstractmethod
    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """g W; (M, out) -> (M, in)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self, self.bias)

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, scales), for putting aside; see `set_codes`."""
        return self.weight.data, getattr(self, self.scale_name)

    def set_codes(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        """Put codes and scales in place without a copy.

        Raises:
            ValueError: a shape or dtype is not this layer's.
        """
        for name, new, old in zip(("weight", self.scale_name), (weight, scales), self.codes(), strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)} and dtype {new.dtype}; this "
                    f"{type(self).__name__} needs {tuple(old.shape)} and {old.dtype}"
                )
        self.weight = nn.Parameter(weight, requires_grad=False)
        setattr(self, self.scale_name, scales)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        scales = getattr(self, self.scale_name)
        super()._apply(fn, recurse)
        moved = getattr(self, self.scale_name)
        if moved.dtype != scales.dtype:
            setattr(self, self.scale_name, scales.to(moved.device))
        return self
