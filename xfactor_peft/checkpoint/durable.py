"""Files that are whole or not there at all: written beside their place, forced to the disk, then renamed into it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_WINDOWS = os.name == "nt"


def write_atomically(path: Path, write: bytes | Callable[[BinaryIO], object], *, hashed: bool = False) -> Path:
    """Put a file in its place in one step; after a crash at any moment the old one or the new one is there.

    Returns where it is.

    Args:
        write: the content, or a function that writes it to the file it is given.
        hashed: the name gets the content's SHA-256 before its suffix: NAME.SHA256.SUFFIX.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing has changed then.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
        sync(temporary)
        if hashed:
            path = path.with_suffix(f".{file_hash(temporary)}{path.suffix}")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk; Windows does the latter by itself."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything in a folder to the disk, so that renaming it afterwards never shows half of it."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            sync(path)
