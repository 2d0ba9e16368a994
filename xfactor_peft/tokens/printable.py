"""Text that came from elsewhere, as it may be printed."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {what}" + "s" * (number != 1)


def printable(text: str) -> str:
    """Without control and direction characters, which could drive a terminal or hide what a line says."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
