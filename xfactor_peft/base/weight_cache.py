"""Weights as they are computed with, written once and mapped from then on: a file for every model and quantisation.

The files lie together in one folder, so that they can be listed, bounded and cleared; a model's own folder may be
read-only, and is not ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock

from ..checkpoint.durable import write_atomically
from ..errors import XFactorError, first_line
from ..lowmem.checkpoint_files import stored_tensors
from ..lowmem.memory import mib
from ..lowmem.weight_file import describe, read_weights
from .fingerprints import weight_files, weights_fingerprints
from .identity import digest_of

FORMAT = 1
LIMIT = 32 * 2**30
"""Bytes of all files together; what was not used for longest makes room."""
PLACE = "XFACTOR_CACHE"
"""The environment's variable that names another folder."""


@dataclass(frozen=True)
class CachedWeights:
    """One file, and when it was used last (seconds since 1970)."""

    path: Path
    size: int
    used: float
    about: dict[str, str]


def cache_folder() -> Path:
    """$XFACTOR_CACHE, or xfactor-peft in the user's folder of caches."""
    if place := os.environ.get(PLACE):
        return Path(place)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "xfactor-peft"


def mapped_weights(
    folder: Path, name: str, kind: dict[str, str], write: Callable[[BinaryIO, dict[str, str]], None]
) -> dict[str, torch.Tensor]:
    """The mapped tensors of the model in `folder`, which are written first where they are not there, or are damaged.

    Args:
        name: the model's, for people.
        kind: what else decides the values: dtype and quantisation.
        write: writes the file, given what its header is to say.

    Raises:
        XFactorError: the file cannot be written.
    """
    path = cache_folder() / f"{_key(folder, kind)}.safetensors"
    with _locked(path.parent):
        if path.is_file():
            try:
                found = read_weights(path)
                os.utime(path)
                return found
            except ValueError:
                path.unlink()
        _make_room(path.parent, _expected(folder, kind["dtype"]))
        try:
            write_atomically(path, lambda file: write(file, {"model": name, **kind}))
        except OSError as error:
            raise _not_written(path.parent, first_line(error)) from error
        return read_weights(path)


def cached() -> list[CachedWeights]:
    """What there is, used last first."""
    found = []
    for path in cache_folder().glob("*.safetensors"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process has just removed it
            continue
        try:
            about = describe(path)
        except ValueError:
            about = {"model": "damaged"}
        found.append(CachedWeights(path, status.st_size, status.st_mtime, about))
    return sorted(found, key=lambda one: -one.used)


def clear(files: list[CachedWeights]) -> None:
    """Remove files, and what killed runs left; those that a run has mapped stay with it until it ends."""
    if cache_folder().is_dir():
        with _locked(cache_folder()):
            _remove_leftovers(cache_folder())
            for one in files:
                one.path.unlink(missing_ok=True)


def _key(folder: Path, kind: dict[str, str]) -> str:
    """The base's fingerprint looks at the leading values of every tensor; sizes and times of the files at the rest."""
    return digest_of([FORMAT, weights_fingerprints(folder)[1], weight_files(folder), kind])[:32]


def _expected(folder: Path, dtype: str) -> int:
    """Bytes that a file takes at most; quantised, it takes less."""
    numbers = sum(prod(tensor.shape) for tensor in stored_tensors(folder).values())
    return numbers * {"fp32": 4, "bf16": 2}[dtype]


def _make_room(folder: Path, size: int) -> None:
    """Remove what was not used for longest until `size` bytes more are within `LIMIT`, and the disk has them."""
    _remove_leftovers(folder)
    files = cached()
    while files and sum(one.size for one in files) + size > LIMIT:
        files.pop().path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise _not_written(folder, f"{mib(free)} are free there, {mib(size)} may be needed")


def _remove_leftovers(folder: Path) -> None:
    """Remove what was being written when a process was killed; who holds the lock knows that no other writes now."""
    for path in folder.glob(".*.safetensors.writing"):
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time looks and writes; another waits for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    except OSError as error:
        raise _not_written(folder, first_line(error)) from error
    try:
        yield
    finally:
        lock.release()


def _not_written(folder: Path, reason: str) -> XFactorError:
    return XFactorError(
        f"mapped weights cannot be written to {folder} ({reason}); name another folder in ${PLACE}, or give "
        "`weights=memory`"
    )
