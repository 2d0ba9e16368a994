"""A trained adapter, or a whole model, written with the record of how it came to be."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapters.output import hashes, write_record
from ..lowmem.noise import without_notes
from ..training.parallel import process
from ..training.train import TrainResult


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
        with without_notes():
            result.model.save_pretrained(str(staging), save_embedding_layers=False)
    else:
        result.model.save_pretrained(staging)
        result.base.tokenizer.save_pretrained(staging)
    record["sha256"] = hashes(staging)
    write_record(staging, record)
    return record


def complete_record(result: TrainResult, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured since `save_result` into the record in `folder`; returns the whole of it."""
    record = {**record, **result.record()}
    write_record(folder, record)
    return record
