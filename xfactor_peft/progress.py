"""Signs of life: what a long call is doing now, for whoever listens; nothing is printed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Listener = Callable[[str, float, int], None]
"""Called with the name of the phase, how much of it is done, and of how much; 0 where it is not counted."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_phase: ContextVar[str] = ContextVar("phase", default="")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` hears of every phase and of its progress."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside is called `name`."""
    token = _phase.set(name)
    report(0, 0)
    try:
        yield
    finally:
        _phase.reset(token)


def report(done: float, total: int) -> None:
    """So much of the present phase is done."""
    listener = _listener.get()
    if listener is not None and _phase.get():
        listener(_phase.get(), done, total)


@dataclass(frozen=True)
class Progress:
    """`size` things of a phase's `total` that are done at the same time, after `start` others."""

    start: int
    size: int
    total: int

    def report(self, share: float) -> None:
        """This share, from 0 to 1, of these is done."""
        report(self.start + share * self.size, self.total)
