"""Records: one JSON file a job, written whole or not at all, with where it comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xfactor_peft.checkpoint.durable import write_atomically
from xfactor_peft.errors import XFactorError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "xfactor-peft")

Record = dict[str, Any]


def write(path: Path, record: Record) -> None:
    """In one step; one line for each key, so that long lists stay short files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write_text(path: Path, text: str) -> str:
    """Write a table or a page; returns the text."""
    path.write_text(text, encoding="utf-8")
    return text


def read(path: Path) -> Record | None:
    """The record, or None when there is no file or it holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_all(folder: Path) -> list[Record]:
    """Every record in `folder`, by file name."""
    return [record for file in sorted(folder.glob("*.json")) if (record := read(file)) is not None]


def provenance() -> Record:
    """What every record holds besides its settings and figures: date, commit, versions, hardware."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),  # results themselves do not count
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": hardware(),
    }


def hardware() -> Record:
    """CPU, cores that this process may use, memory, and the GPU if torch sees one."""
    found = {"cpu": _cpu(), "cores": cores()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def make_checkpoint(folder: Path, shape: str, *more: str | Path) -> None:
    """Write random weights of a shape into `folder`, unless a model is there and `more` does not say --force."""
    if (folder / "config.json").is_file() and "--force" not in more:
        return
    words = [REPOSITORY / "tools/make_checkpoint.py", folder, "--shape", shape, *more]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise XFactorError(f"the {shape} checkpoint could not be made: {done.stderr.strip().splitlines()[-1]}")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(*words: str) -> str | None:
    """Output of a git command in this repository; None outside of one, or without git."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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


def resident_mib() -> float:
    """The resident set of this process now; 0 where there is no /proc."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if path.exists() else 0.0
