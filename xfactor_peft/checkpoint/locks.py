"""One run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from ..errors import XFactorError

_PATIENCE = 0.2
"""Seconds to wait for a holder that is just letting go."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside `folder`; the system lets go of it when the process ends, however it ends.

    Raises:
        XFactorError: another run holds it, or the parent of `folder` cannot be written.
    """
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise XFactorError(
            f"another run{_holder(path)} is writing {folder}; wait for it, or choose another `output`"
        ) from None
    except OSError as error:
        raise XFactorError(
            f"{folder.parent} cannot be written: {error.strerror or error}; choose another `output`"
        ) from error
    soft = isinstance(lock, SoftFileLock)  # where the system has no locks; such a file names its process itself
    try:
        with suppress(OSError):  # Windows lets nobody write to a locked file
            if not soft:
                path.write_text(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):  # nor remove it
            if not soft:
                path.unlink()  # while it is still held, so that nobody waits on a file that is gone
        lock.release()


def _holder(path: Path) -> str:
    try:
        return f" (process {int(path.read_text().split()[0])})"
    except (OSError, ValueError, IndexError):
        return ""
