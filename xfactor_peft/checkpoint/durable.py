"""Files that are whole or not there at all: written beside their place, forced to the disk, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: bytes | Callable[[Path], None]) -> None:
    """Put a file in its place in one step; after a crash at any moment the old one or the new one is there.

    Args:
        write: the content, or a function that writes it to the path it is given.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing has changed then.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        if isinstance(write, bytes):
            temporary.write_bytes(write)
        else:
            write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything in a folder to the disk, so that renaming it afterwards never shows half of it."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            sync(path)
