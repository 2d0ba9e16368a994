"""Buffers that are used again and again, instead of fresh allocations in every layer and every step.

A buffer belongs to a purpose, a dtype and a device, grows to the largest size asked for, and is overwritten by the
next user of the same purpose: nothing that must outlive the call may stay in one. Buffers are per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import torch

_local = threading.local()


def _pool() -> dict[tuple[str, torch.dtype, torch.device], torch.Tensor]:
    if not hasattr(_local, "pool"):
        _local.pool = {}
    return _local.pool


def scratch(purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised contiguous tensor of `shape` that shares the buffer of (`purpose`, `dtype`, `device`)."""
    key = (purpose, dtype, torch.device(device))
    size = prod(shape)
    pool = _pool()
    buffer = pool.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = None
        pool.pop(key, None)  # the old one goes before the new one comes
        with torch.inference_mode(False):
            pool[key] = buffer = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(*shape)


def release_scratch() -> None:
    """Give this thread's buffers back."""
    _pool().clear()
