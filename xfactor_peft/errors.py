"""The one exception for mistakes a user can mend."""

from __future__ import annotations

from pathlib import Path


class XFactorError(ValueError):
    """Bad input or a bad environment; the message says what was wrong and what to do next.

    The command line prints it as one line and exits with status 2. Programming errors stay ordinary exceptions.
    """


class OutOfRoom(XFactorError):
    """The memory or the disk is full: the same run can go on from what it saved, once there is room."""


def first_line(error: BaseException) -> str:
    """What an exception of another library's says, in one line: its first, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def text_of(path: Path, where: str) -> str:
    """The text of a user's file; raises XFactorError, which begins with `where`, for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise XFactorError(f"{where}: cannot be read as UTF-8 text: {error}") from error


class XFactorWarning(UserWarning):
    """What is done although it may not be what was meant; the command line prints it on a line of its own."""
