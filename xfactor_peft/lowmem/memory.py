"""Peak memory of this process: resident set on Linux and macOS, allocator peak on CUDA. All in MiB."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .allocator import give_back_pages

_MIB = 2**20


def peak_rss() -> float:
    """Highest resident set size since the start, or since `reset_peak`; VmHWM where /proc has it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def reset_peak(device: torch.device) -> bool:
    """Start a new measurement, so that load and train have peaks of their own; False where the kernel cannot.

    Freed pages go back first: no phase is charged with what another one left.
    """
    give_back_pages()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peaks(device: torch.device) -> dict[str, float]:
    """{"rss_mib": ...} and on CUDA also {"cuda_mib": ...} (max_memory_allocated)."""
    result = {"rss_mib": round(peak_rss(), 1)}
    if device.type == "cuda":
        result["cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / _MIB, 1)
    return result


def mib(size: float) -> str:
    """Bytes as text, in MiB."""
    return f"{size / 2**20:,.0f} MiB"
