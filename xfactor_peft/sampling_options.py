"""Decoding settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import XFactorError


@dataclass(frozen=True)
class SamplingOptions:
    """Decoding settings under transformers' names; the defaults sample from the model's own distribution.

    `top_k=0` and `top_p=1.0` switch truncation off. `temperature=0` is greedy.

    Raises:
        XFactorError: a value outside its range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise XFactorError(f"--max-new-tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise XFactorError(f"--temperature must be at least 0; got {self.temperature:g}")
        if self.top_k < 0:
            raise XFactorError(f"--top-k must be at least 0 (0 switches it off); got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise XFactorError(f"--top-p must be above 0 and at most 1; got {self.top_p:g}")

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
