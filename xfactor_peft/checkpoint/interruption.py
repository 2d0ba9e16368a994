"""Ctrl-C and SIGTERM: a run finishes its step, saves, and says how to resume it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; the message says what was saved and how to resume.

    Attributes:
        status: the exit status that shells expect, 128 + the signal's number.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """A `with` block in which SIGINT and SIGTERM raise `Interrupted`, and inside `deferred()` wait to be asked for.

    A second signal does not wait. Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal in here only sets `requested`; look at it where the state is consistent."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, number
        if not (self._deferring and first):
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)
