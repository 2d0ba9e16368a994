"""Output folders: written beside their place, moved there whole, with a record of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..checkpoint.durable import sync, sync_tree
from ..errors import XFactorError
from ..training.parallel import process
from ..training.train import TrainResult
from .card import model_card
from .files import CONFIG, RECORD


def prepare_output(folder: Path, *, force: bool) -> Path:
    """Check that `folder` may be written, and return an empty staging folder beside it.

    Raises:
        XFactorError: the folder exists and `force` is off, or its parent cannot be written.
    """
    if folder.exists() and not force:
        raise XFactorError(f"{folder} exists; pass --force to replace it, or --output for another place")
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise XFactorError(f"{folder} holds something that is not a run of this tool; --force does not replace it")
    staging = staging_of(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise XFactorError(f"{folder.parent} cannot be written: {error.strerror or error}; choose --output") from error
    return staging


def staging_of(folder: Path) -> Path:
    """Where `folder` is made before it takes its name."""
    return folder.parent / f".{folder.name}.partial"


def publish(staging: Path, folder: Path) -> None:
    """Move a finished staging folder into place, whole on the disk; an old one is removed only after that."""
    sync_tree(staging)
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_result(result: TrainResult, staging: Path, name: str) -> dict[str, Any]:
    """Write a trained adapter (or, for full fine-tuning, the whole model) into `staging`; returns the record.

    An adapter is `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, `xfactor.json`
    (base identity, token rule and hash, settings, scores) and a model card, `README.md`.
    """
    record = {
        "format": 1,
        "name": name,
        "kind": result.options.method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processes": process()[1],
        **result.record(),
    }
    if isinstance(result.model, PeftModel):
        for config in result.model.peft_config.values():
            config.base_model_name_or_path = result.base.choice.name
            config.revision = result.base.choice.revision
        result.model.save_pretrained(str(staging), save_embedding_layers=False)
    else:
        result.model.save_pretrained(staging)
        result.base.tokenizer.save_pretrained(staging)
    record["sha256"] = hashes(staging)
    write_record(staging, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Put `xfactor.json` and the model card beside the weights."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the configuration and every file of weights, by name."""
    paths = [*sorted(folder.glob("*.safetensors")), folder / CONFIG]
    return {path.name: file_hash(path) for path in paths if path.is_file()}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
