"""Signs of life: what a long call is doing now, for whoever listens; nothing is printed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, float], None]
"""Called with the name of the phase and how much of it is done, from 0 to 1."""

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
    report(0.0)
    try:
        yield
        report(1.0)
    finally:
        _phase.reset(token)


def report(done: float) -> None:
    """This share of the present phase is done."""
    listener = _listener.get()
    if listener is not None and _phase.get():
        listener(_phase.get(), done)
