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
from safetensors import SafetensorError

from ..checkpoint.durable import file_hash, sync, sync_tree, write_atomically
from ..checkpoint.locks import folder_lock
from ..errors import OutOfRoom, XFactorError, first_line
from ..lowmem.noise import without_notes
from .card import model_card
from .files import CARD, CONFIG, RECORD, SETTINGS, write_json

if TYPE_CHECKING:
    from peft import PeftModel  # which takes seconds to import


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Raises XFactorError for a folder that exists and `force` is off, or that holds something else than a run."""
    if folder.exists() and not force:
        raise XFactorError(f"{folder} exists; pass `force=True` to replace it, or another `output`")
    holds = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if holds and not (folder / RECORD).is_file():
        raise XFactorError(f"{folder} holds something that is not a run of this tool; `force=True` does not replace it")


def check_free(folder: Path, *, force: bool) -> None:
    """Raises XFactorError where `check_replaceable` does, and without `force` where a run waits to take the place."""
    check_replaceable(folder, force=force)
    if not force:
        check_no_run(folder)


def check_no_run(folder: Path) -> None:
    """Raises XFactorError where a run that is not finished will take the name of `folder`."""
    staging = staging_of(folder)
    if (staging / SETTINGS).is_file():
        raise XFactorError(
            f"an unfinished run of {folder.name} is in {staging}; resume it, delete that folder, or choose another name"
        )


def empty_folder(path: Path) -> Path:
    """Make `path` an empty folder, whatever was there; raises XFactorError where that cannot be."""
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        raise XFactorError(
            f"{path.parent} cannot be written: {error.strerror or error}; choose another `output`"
        ) from error
    return path


def staging_of(folder: Path) -> Path:
    """Where a run keeps what it saves until it takes the name `folder`."""
    return folder.parent / f".{folder.name}.partial"


@contextmanager
def writing(place: Path, left: str) -> Iterator[None]:
    """Inside, a write that the system refuses is an OutOfRoom, which ends with what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise OutOfRoom(f"{place} cannot be written ({why}); {left}") from error


@contextmanager
def _making(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`, apart from any run's, which is gone after the block."""
    staging = place.parent / f".{place.name}.making"
    with writing(place, "nothing was replaced"), folder_lock(staging):
        try:
            yield empty_folder(staging)
        finally:  # a Ctrl-C too leaves nothing behind
            shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, folder: Path) -> None:
    """Move a finished staging folder into place, whole on the disk; an old one is removed only after that.

    Raises:
        OSError: it cannot be moved; the old one is in its place.
    """
    sync_tree(staging)
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder that takes the place of `folder`, if it may, when the block is done; gone when it fails.

    Raises:
        XFactorError: something is there and `force` is off, or another process is making the same.
        OutOfRoom: it cannot be written.
    """
    check_free(folder, force=force)
    with _making(folder) as staging:
        yield staging
        publish(staging, folder)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Where to write a file (and others beside it) that take their places when the block is done, and not before.

    Raises:
        XFactorError: another process is making the same.
        OutOfRoom: they cannot be written.
    """
    with _making(path) as staging:
        yield staging / path.name
        sync_tree(staging)
        for made in sorted(staging.iterdir()):
            os.replace(made, path.parent / made.name)
        sync(path.parent)


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
