"""Output folders: written beside their place, moved there whole, with a record of what they hold."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.durable import file_hash, sync, sync_tree, write_atomically
from ..errors import XFactorError
from ..lowmem.noise import without_notes
from .card import model_card
from .files import CARD, CONFIG, RECORD, write_json

if TYPE_CHECKING:
    from peft import PeftModel  # which takes seconds to import


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Raises XFactorError for a folder that exists and `force` is off, or that holds something else than a run."""
    if folder.exists() and not force:
        raise XFactorError(f"{folder} exists; pass `force=True` to replace it, or another `output`")
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise XFactorError(f"{folder} holds something that is not a run of this tool; `force=True` does not replace it")


def prepare_output(folder: Path, *, force: bool) -> Path:
    """Check that `folder` may be written, and return an empty staging folder beside it.

    Raises:
        XFactorError: the folder exists and `force` is off, or its parent cannot be written.
    """
    check_replaceable(folder, force=force)
    return _empty_staging(folder)


def _empty_staging(place: Path) -> Path:
    staging = staging_of(place)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise XFactorError(
            f"{place.parent} cannot be written: {error.strerror or error}; choose another `output`"
        ) from error
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


@contextmanager
def staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder that takes the place of `folder`, if it may, when the block is done; gone when it fails."""
    staging = prepare_output(folder, force=force)
    try:
        yield staging
        publish(staging, folder)
    except BaseException:  # a Ctrl-C too leaves nothing behind
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Where to write a file (and others beside it) that take their places when the block is done, and not before."""
    staging = _empty_staging(path)
    try:
        yield staging / path.name
        sync_tree(staging)
        for made in sorted(staging.iterdir()):
            os.replace(made, path.parent / made.name)
        sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def record_head(name: str, kind: str) -> dict[str, Any]:
    """How the record of a run begins: its format, what it is of, when and where it was made."""
    return {
        "format": 1,
        "name": name,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def save_adapter(model: PeftModel, staging: Path, base: str, revision: str | None) -> None:
    """Write an adapter as PEFT does, with the name and revision of the base that it was made for."""
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = base, revision
    with without_notes():
        model.save_pretrained(str(staging), save_embedding_layers=False)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Put `xfactor.json` and the model card beside the weights, each in one step."""
    write_json(folder / RECORD, record)
    write_atomically(folder / CARD, model_card(record).encode())


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the configuration and every file of weights, by name."""
    paths = [*sorted(folder.glob("*.safetensors")), folder / CONFIG]
    return {path.name: file_hash(path) for path in paths if path.is_file()}
