"""The arms of the memory benchmark: what is run, and what the figures to reach are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One row: a stack ("ours" or "plain"), how the weights are stored, and the size of a batch.

    Attributes:
        stored: "fp32", "bf16", "int8" or "nf4"; quantised arms compute in bf16.
        decode: instead of training, continue one prompt token by token; a step is a token.
        against: the plain arm whose step time this one is divided by.
        most_mib: peak to stay below, MiB, or None.
        most_ratio: step time over that of `against` to stay below, or None.
    """

    name: str
    stack: str
    stored: str
    checkpointing: bool = False
    length: int = 64
    method: str = "lora"
    decode: bool = False
    against: str | None = None
    most_mib: int | None = None
    most_ratio: float | None = None

    @property
    def quantization(self) -> str | None:
        return self.stored if self.stored in ("int8", "nf4") else None

    @property
    def dtype(self) -> str:
        return "fp32" if self.stored == "fp32" else "bf16"


BATCH = 4
ARMS = (
    Arm("8-bit, checkpointing", "ours", "int8", True, against="plain 8-bit", most_mib=1000, most_ratio=0.85),
    Arm("8-bit", "ours", "int8", against="plain 8-bit", most_mib=1350, most_ratio=0.55),
    Arm("4-bit, checkpointing", "ours", "nf4", True, against="plain 4-bit", most_mib=850, most_ratio=1.0),
    Arm("bf16", "ours", "bf16", against="plain bf16", most_mib=1700, most_ratio=0.75),
    Arm("8-bit, checkpointing, 4 x 1024", "ours", "int8", True, length=1024, most_mib=2000),
    Arm("plain 8-bit", "plain", "int8"),
    Arm("plain 4-bit", "plain", "nf4"),
    Arm("plain bf16", "plain", "bf16"),
    Arm("plain full fine-tuning fp32", "plain", "fp32", method="full"),
    Arm("decoding, 8-bit", "ours", "int8", decode=True, against="decoding, plain bf16", most_ratio=1.0),
    Arm("decoding, 4-bit", "ours", "nf4", decode=True, against="decoding, plain bf16"),
    Arm("decoding, plain bf16", "plain", "bf16", decode=True),
    Arm("decoding, plain 8-bit", "plain", "int8", decode=True, against="decoding, plain bf16"),
)
REFERENCE = Arm("plain fp32 LoRA", "plain", "fp32")
PARITY = {Arm("bf16", "ours", "bf16"): 0.01, Arm("8-bit", "ours", "int8"): 0.02}
"""Share by which 50 losses may differ from those of the reference with the same seed and inputs."""
