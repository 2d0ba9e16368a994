"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class XFactorError(ValueError):
    """Bad input or a bad environment; the message says what was wrong and what to do next.

    The command line prints it as one line and exits with status 2. Programming errors stay ordinary exceptions.
    """
