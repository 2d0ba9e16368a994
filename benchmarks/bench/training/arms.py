"""The arms: one way of training each, without model, seed or learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

_TARGETS = {"all": "attention + MLP", "attention": "attention", "mlp": "MLP", "all,head": "attention + MLP + set head"}
_PRECISIONS = {"int8": "8-bit", "nf4": "4-bit"}
_OPTIMIZERS = {"adam": "", "adamw": "", "adam8bit": "8-bit Adam", "adafactor": "Adafactor"}


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        method: "none" (the base as it is), "full" or "lora".
        dtype: "fp32", "bf16" or "auto". Full fine-tuning in bf16 computes in bf16 and keeps float32 weights.
        quantization: of LoRA's frozen weights, "int8", "nf4" or None.
        target, r: where LoRA goes, and its rank; alpha is 2 r. With "all,head" the set's logits are also raised by a
            constant, which is what a set head does (see `measure.raise_set`).
        optimizer: a name from `xfactor_peft.training.optimizers`.
    """

    method: str = "lora"
    dtype: str = "bf16"
    quantization: str | None = None
    target: str = "all"
    r: int = 8
    optimizer: str = "adam"

    @property
    def precision(self) -> str:
        return self.quantization or self.dtype

    @property
    def name(self) -> str:
        """For file names: "full-bf16-adam8bit", "lora-r8-all-int8"."""
        if self.method == "none":
            return "base"
        target = self.target.replace(",", "+")
        parts = [self.method] + ([f"r{self.r}", target] if self.method == "lora" else []) + [self.precision]
        return "-".join(parts + ([] if self.optimizer == "adam" else [self.optimizer]))

    @property
    def label(self) -> str:
        """For people: "LoRA r=8, attention + MLP, 8-bit"."""
        if self.method == "none":
            return "base, not trained"
        parts = ["full"] if self.method == "full" else [f"LoRA r={self.r}", _TARGETS[self.target]]
        parts += [_PRECISIONS.get(self.precision, self.precision), _OPTIMIZERS[self.optimizer]]
        return ", ".join(part for part in parts if part)


BASE = Arm("none", "fp32")
FULL = Arm("full", "fp32")
FULL_BF16 = Arm("full")
FULL_8BIT_ADAM = Arm("full", optimizer="adam8bit")
FULL_ADAFACTOR = Arm("full", optimizer="adafactor")
LORA_FP32 = Arm(dtype="fp32")
LORA_BF16 = Arm()
LORA_INT8 = Arm(dtype="auto", quantization="int8")
LORA_NF4 = Arm(dtype="auto", quantization="nf4")

CORE = (FULL, FULL_BF16, FULL_8BIT_ADAM, LORA_FP32, LORA_BF16, LORA_INT8, LORA_NF4)
OPTIMIZERS = FULL_8BIT_ADAM, FULL_ADAFACTOR
ALL = (*CORE[:3], FULL_ADAFACTOR, *CORE[3:])
GRID = tuple(
    Arm(dtype="fp32", target=target, r=r)
    for target in ("attention", "mlp", "all", "all,head")
    for r in (1, 4, 8, 16, 64)
)
CROSS = tuple(arm for arm in GRID if arm.r == 8 or arm.target == "all")
"""Every rank in one place, and every place at one rank."""
OTHERS = (LORA_BF16, LORA_INT8, LORA_NF4, FULL, FULL_BF16, *(replace(arm, dtype="fp32") for arm in OPTIMIZERS))
"""Other precisions than the float32 of `GRID`, and full fine-tuning."""
