"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class XFactorError(ValueError):
    """Bad input or a bad environment; the message says what was wrong and what to do next.

    The command line prints it as one line and exits with status 2. Programming errors stay ordinary exceptions.
    """


def first_line(error: BaseException) -> str:
    """What an exception of another library's says, in one line: its first, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class XFactorWarning(UserWarning):
    """What is done although it may not be what was meant; the command line prints it on a line of its own."""
