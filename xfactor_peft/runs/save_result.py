"""A trained adapter, or a whole model, written with the record of how it came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from ..adapters.output import hashes, record_head, save_adapter, write_record
from ..training.parallel import process
from ..training.train import TrainResult


def save_result(result: TrainResult, staging: Path, name: str) -> dict[str, Any]:
    """Write a trained adapter (or, for full fine-tuning, the whole model) into `staging`; returns the record.

    An adapter is `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, `xfactor.json`
    (base identity, token rule and hash, settings, scores) and a model card, `README.md`.
    """
    record = {
        **record_head(name, result.options.method),
        "processes": process()[1],
        **result.record(),
    }
    if isinstance(result.model, PeftModel):
        save_adapter(result.model, staging, result.base.choice.name, result.base.choice.revision)
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
