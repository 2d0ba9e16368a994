"""One JSON file a run, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CHECKS = "checks.json"
RUNS = "runs"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write under a temporary name, then rename; one line for each key, so that long lists stay short files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any] | None:
    """The record, or None when there is no file or it holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every run's record in `folder`, by file name."""
    found = [read(file) for file in sorted((folder / RUNS).glob("*.json"))]
    return [record for record in found if record is not None]
