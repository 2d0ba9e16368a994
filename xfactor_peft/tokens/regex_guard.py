"""Regular expressions that may take exponential time, found before they are used."""

from __future__ import annotations

import re
from typing import Any

_PARSER = re._parser  # type: ignore[attr-defined]  # an inner part of CPython, not in typeshed


def slow_regex(pattern: str) -> bool:
    """Whether a regular expression repeats a repeat or an alternative, e.g. (a+)+, and so may take exponential time."""
    try:
        return _nested(_PARSER.parse(pattern), False)
    except (re.error, RecursionError, OverflowError):
        return False  # `re.compile` says what is wrong with it


def _nested(parsed: Any, repeated: bool) -> bool:
    for operation, argument in parsed:
        name = str(operation)
        repeat = name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
        many = repeat and argument[1] > 1
        if repeated and (many or name == "BRANCH" or (repeat and argument[0] != argument[1])):
            return True
        if any(_nested(part, repeated or many) for part in _sub_patterns(argument)):
            return True
    return False


def _sub_patterns(argument: Any) -> list[Any]:
    """Sub-patterns anywhere inside an operation's argument."""
    if isinstance(argument, _PARSER.SubPattern):
        return [argument]
    if isinstance(argument, list | tuple):
        return [part for item in argument for part in _sub_patterns(item)]
    return []
