"""Checks of values read from JSON, of which nothing is sure: a bool counts as an int, NaN as a number."""

from __future__ import annotations

import math
from typing import Any


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Finite, and of a size that does not overflow in what follows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def shown(value: Any) -> str:
    """The value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
