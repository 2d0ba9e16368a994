"""Keep bitsandbytes out of a process that does not use it."""

from __future__ import annotations

import sys

_NAME = "bitsandbytes"


def leave_out_bitsandbytes() -> bool:
    """Make `import bitsandbytes` fail in this process, which saves 45 MiB; call it before PEFT is imported.

    PEFT imports bitsandbytes whenever it is installed, and takes its absence well. Returns False, and changes
    nothing, when it is imported already. `allow_bitsandbytes` undoes it, but PEFT remembers what it found.
    """
    if sys.modules.get(_NAME) is not None:
        return False
    # Python's own way of marking a module that must not be imported
    sys.modules[_NAME] = None  # type: ignore[assignment]  # which typeshed does not know
    return True


def allow_bitsandbytes() -> None:
    """Undo `leave_out_bitsandbytes`."""
    if _NAME in sys.modules and sys.modules[_NAME] is None:
        del sys.modules[_NAME]
