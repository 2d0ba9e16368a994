"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import XFactorError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside `folder`; the kernel lets go of it when the process ends, however it ends.

    Raises:
        XFactorError: another run holds it, or the parent of `folder` cannot be written.
    """
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except BlockingIOError:
        holder = _holder(path)
        raise XFactorError(
            f"another run{holder} is writing {folder}; wait for it, or choose another place with --output"
        ) from None
    except OSError as error:
        raise XFactorError(f"{folder.parent} cannot be written: {error.strerror or error}; choose --output") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody waits on a file that is gone
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """An open, locked descriptor of the file that has this name now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it in between; try the new one


def _holder(path: Path) -> str:
    try:
        return f" (process {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
