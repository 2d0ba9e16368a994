"""LoRA layers for PEFT that run as one autograd function, on plain and on quantised linear layers.

    config._register_custom_module(custom_modules())

Everything else is PEFT: the adapter files, `set_adapter`, `load_adapter`, `disable_adapter`, merging and unloading.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .fused_lora import FrozenWeight, frozen_linear
from .gguf_layers import GgufLinear
from .int8 import Int8Linear
from .nf4 import NF4Linear
from .peft_parts import side_a, side_b
from .quantized import QuantizedLinear
from .scratch import scratch


@dataclass(frozen=True)
class PlainWeight:
    """A `FrozenWeight` in full precision, (out, in); `transposed` says that it is stored as Conv1D's, (in, out)."""

    weight: torch.Tensor
    transposed: bool = False

    def product(self, x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        weight = self._in(x.dtype)
        weight = weight if self.transposed else weight.T
        return x @ weight if addend is None else addend.addmm_(x, weight)

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        weight = self._in(gradient.dtype)
        return gradient @ (weight.T if self.transposed else weight)

    def _in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`: itself, or a converted copy in the scratch buffer (under autocast)."""
        if self.weight.dtype == dtype:
            return self.weight.detach()
        return scratch("weight", self.weight.shape, dtype, self.weight.device).copy_(self.weight.detach())


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA on nn.Linear or Conv1D, fused where it is vanilla LoRA.

    PEFT's own forward runs for everything else: dropout while training, adapters merged or off, `adapter_names`,
    a base weight that trains, LoRA variants, and inference on plain weights, where fusing saves nothing and PEFT's
    order of sums gives logits that are bit-equal to those of plain PEFT.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not names or not self._fuses(names):
            return super().forward(x, *args, **kwargs)
        base = cast("nn.Linear | Conv1D", self.get_base_layer())
        lora_a, lora_b, scaling = self._factors(names)
        y = frozen_linear(x, self._frozen_weight(), base.bias, lora_a, lora_b, scaling)
        for name in names:
            extra = side_b(self, name).bias
            if extra is not None:
                y = y + (extra * self.scaling[name]).to(y.dtype)
        return y

    def _fuses(self, names: list[str]) -> bool:
        """Whether the sum over these adapters is what the fused function computes."""
        if self.disable_adapters or self.merged or self.base_layer.weight.requires_grad:
            return False
        if type(self.base_layer) not in _WRAPPERS:  # another tuner's layer inside this one
            return False
        if not (torch.is_grad_enabled() or isinstance(self.base_layer, QuantizedLinear)):
            return False
        return all(
            name not in self.lora_variant
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            and type(self.lora_A[name]) is type(self.lora_B[name]) is nn.Linear
            for name in names
        )

    def _factors(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (sum of r, in), B (out, sum of r) and one scaling for the sum over adapters."""
        if len(names) == 1:
            name = names[0]
            return side_a(self, name).weight, side_b(self, name).weight, self.scaling[name]
        lora_a = torch.cat([side_a(self, name).weight for name in names])
        lora_b = torch.cat([side_b(self, name).weight * self.scaling[name] for name in names], dim=1)
        return lora_a, lora_b, 1.0

    def _frozen_weight(self) -> FrozenWeight:
        base = cast("nn.Linear | Conv1D", self.base_layer)
        return PlainWeight(base.weight, isinstance(base, Conv1D))


class QuantizedLoraLinear(FusedLoraLinear):
    """LoRA on an `Int8Linear` or `NF4Linear`.

    Merging quantises W + s B A anew, with the rounding that implies; the codes from before are kept until
    unmerging, which puts them back bit for bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # codes are (out, in), whatever the configuration says of the plain model
        self._before_merge: tuple[torch.Tensor, ...] | None = None

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight.

        Raises:
            ValueError: `safe_merge`, and the sum is not finite.
            RuntimeError: an adapter has a bias and the base layer none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = cast("QuantizedLinear", self.get_base_layer())
        weight = base.dequantize(torch.float32)
        bias = None if base.bias is None else base.bias.data
        for name in names:
            weight += self.get_delta_weight(name).float()
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("LoRA with a bias cannot be merged into a layer that has none")
                bias = bias + (side_b(self, name).bias * self.scaling[name]).detach().to(bias.dtype)
        if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(f"merging {', '.join(names)} gives values that are not finite; the adapter seems broken")
        if self._before_merge is None:
            self._before_merge = (*base.codes(), *(() if base.bias is None else (base.bias.data,)))
        base.quantize_(weight)
        if bias is not None:
            base.bias.data = bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight from before the merge back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = cast("QuantizedLinear", self.get_base_layer())
        assert self._before_merge is not None  # `merge` kept it
        weight, scales, *bias = self._before_merge
        base.set_codes(weight, scales)
        if bias:
            base.bias.data = bias[0]
        self._before_merge = None
        self.merged_adapters.clear()

    def _frozen_weight(self) -> FrozenWeight:
        return cast("QuantizedLinear", self.base_layer)


_WRAPPERS: dict[type[nn.Module], type[FusedLoraLinear]] = {
    Int8Linear: QuantizedLoraLinear,
    NF4Linear: QuantizedLoraLinear,
    GgufLinear: QuantizedLoraLinear,
    nn.Linear: FusedLoraLinear,
    Conv1D: FusedLoraLinear,
}


def _wrap(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """PEFT's dispatcher for one layer; None leaves it to PEFT.

    Raises:
        ValueError: a variant such as DoRA is asked for on a quantised layer.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    wrapper = _WRAPPERS.get(type(base))  # exact: bitsandbytes' layers are nn.Linear, too, and not ours
    if wrapper is None or kwargs.pop("parameter_name", None) is not None:
        return None
    variants = _variants(config)
    if variants and not isinstance(base, QuantizedLinear):
        return None
    if variants:
        raise ValueError(f"{type(base).__name__} carries plain LoRA only, not {', '.join(variants)}; load unquantised")
    from_conv1d = isinstance(base, Conv1D) or getattr(base, "from_conv1d", False)
    config.fan_in_fan_out = from_conv1d  # what the adapter file says, for those who load it on the plain model
    return wrapper(target, adapter_name, config=config, is_target_conv_1d_layer=isinstance(base, Conv1D), **kwargs)


def _variants(config: LoraConfig) -> list[str]:
    """The variants of LoRA that a configuration asks for, by the names of its fields."""
    tagged = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    names = {*tagged, "use_dora", "alora_invocation_tokens", "arrow_config"}
    return sorted(name for name in names if getattr(config, name, None))


def custom_modules() -> dict[type[nn.Module], Callable[..., nn.Module | None]]:
    """What to hand to `LoraConfig._register_custom_module`: which layers carry LoRA in the fused form.

    The adapter configuration's `fan_in_fan_out` is set to what holds for the plain model.
    """
    return dict.fromkeys(_WRAPPERS, _wrap)
