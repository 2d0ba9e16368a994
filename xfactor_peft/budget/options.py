"""What the user says about memory."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import XFactorError

CHECKPOINTING = ("auto", "on", "off")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class MemoryOptions:
    """How a run keeps its memory small.

    Attributes:
        checkpointing: "on" recomputes every block in backward (Chen et al. 2016, arXiv:1604.06174), "off" none, a
            number so many of the first blocks, "auto" as few of them as keep the predicted peak inside `budget`.
        budget: bytes; None means what this machine has free.

    Raises:
        XFactorError: an unknown word, or a budget that is not positive.
    """

    checkpointing: str | int = "auto"
    budget: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.checkpointing, int) and self.checkpointing >= 0
        if not number and self.checkpointing not in CHECKPOINTING:
            raise XFactorError(f"--checkpointing must be auto, on or off; got {self.checkpointing!r}")
        if self.budget is not None and self.budget <= 0:
            raise XFactorError(f"--memory-budget must be greater than 0; got {self.budget}")

    def record(self) -> dict[str, Any]:
        return asdict(self)


def parse_size(text: str) -> int:
    """Bytes from "1GiB", "900MiB", "1.5G" (decimal) or "512mb".

    Raises:
        XFactorError: it is no number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise XFactorError(f"--memory-budget {text!r} is not a size; write for example 1GiB or 900MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def mib(size: float) -> str:
    """Bytes as text, in MiB."""
    return f"{size / 2**20:,.0f} MiB"
