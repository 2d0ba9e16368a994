"""Where a result comes from: versions, commit, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "xfactor-peft")
RESULTS = "benchmarks/results"


def provenance() -> dict[str, Any]:
    """What every JSON file holds besides its settings and figures."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": dirty(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": hardware(),
    }


def git(*words: str) -> str | None:
    """Output of a git command in this repository; None outside of one, or without git."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dirty() -> bool | None:
    """Whether tracked files other than results differ from the commit; None when there is no commit to differ from."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")
    return None if changed is None else bool(changed)


def hardware() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, and the GPU if torch sees one."""
    found = {"cpu": _cpu(), "cores": cores()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
