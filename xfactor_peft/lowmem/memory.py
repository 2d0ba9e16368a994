"""Peak memory of this process: resident set, and on CUDA the allocator's peak. All in MiB."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from .allocator import give_back_pages
from .scratch import release_scratch

_MIB = 2**20


def peak_rss() -> float:
    """Highest resident set size since the start, or since `reset_peak`: VmHWM of /proc on Linux.

    Elsewhere what psutil has: the peak since the start on Windows, the present size on macOS.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    now = psutil.Process().memory_info()
    return getattr(now, "peak_wset", now.rss) / _MIB


def reset_peak(device: torch.device) -> bool:
    """Start a new measurement, so that load and train have peaks of their own; False where the kernel cannot.

    Scratch buffers and freed pages go back first: no phase is charged with what another one left.
    """
    gc.collect()  # models hold on to themselves in circles
    release_scratch()
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
