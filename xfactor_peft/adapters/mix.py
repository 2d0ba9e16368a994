"""What is active: the base, one adapter or a weighted mix of several, W + sum_i w_i s_i B_i A_i."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import XFactorError

BASE = "none"


@dataclass(frozen=True)
class Mix:
    """What is active: no adapter (the base), one, or several with their weights.

    Attributes:
        parts: (name, weight); a weight of 1 is the adapter as trained, of 0 the base.

    Raises:
        XFactorError: a weight that is not finite, or the same adapter twice.
    """

    parts: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if len(set(names)) < len(names):
            raise XFactorError(f"an adapter is in the mix {self} twice; give its weights as one")
        for name, weight in self.parts:
            if not math.isfinite(weight):
                raise XFactorError(f"the scale of adapter {name} must be a finite number; got {weight}")

    @classmethod
    def of(cls, name: str | None, scale: float = 1.0) -> Mix:
        """One adapter at `scale`, or the base for None."""
        return cls() if name is None else cls(((name, scale),))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def scaled(self, scale: float) -> Mix:
        """Every weight times `scale`."""
        return Mix(tuple((name, weight * scale) for name, weight in self.parts))

    def __str__(self) -> str:
        """ "base", "x", or "x:0.7+z:0.3"; `parse_mix` reads all but the first."""
        return "+".join(name if weight == 1 else f"{name}:{weight:.4g}" for name, weight in self.parts) or "base"


def parse_mix(text: str, known: Iterable[str] = ()) -> Mix:
    """ "NAME", "NAME:WEIGHT" or several of these joined by "+"; "none" alone is the base.

    A name in `known`, or an existing path, that itself holds ":" or "+" is taken whole, also with a weight behind it.

    Raises:
        XFactorError: an empty part, or a weight that is not a finite number.
    """
    known = set(known)
    if text == BASE:
        return Mix()
    pieces, parts = text.split("+"), []
    while pieces:
        joined = ["+".join(pieces[:count]).strip() for count in range(len(pieces), 0, -1)]
        part = next(
            (part for part in joined if _whole(part, known) or _whole(part.rpartition(":")[0], known)), joined[-1]
        )
        parts.append(_part(part, text, known))
        del pieces[: part.count("+") + 1]
    return Mix(tuple(parts))


def parse_mixes(texts: Iterable[str], known: Iterable[str] = ()) -> list[Mix]:
    """What several texts mean side by side: each is a column of its own, but all single NAME:WEIGHT make up one mix.

    "none", "x" are the base and x side by side; "x:0.7", "z:0.3" is one mix, the same as "x:0.7+z:0.3". Several mixes
    side by side are several texts with "+". Raises XFactorError as `parse_mix` does.
    """
    known = set(known)
    columns: list[Mix | None] = []
    weighted: list[tuple[str, float]] = []
    for text in dict.fromkeys(texts):
        mix = parse_mix(text, known)
        if len(mix.parts) == 1 and mix.parts[0][0] != text:
            if not weighted:
                columns.append(None)
            weighted += mix.parts
        else:
            columns.append(mix)
    return [Mix(tuple(weighted)) if mix is None else mix for mix in columns]


def _whole(part: str, known: set[str]) -> bool:
    return part in known or (bool(part) and Path(part).is_dir())


def _part(part: str, text: str, known: set[str]) -> tuple[str, float]:
    if _whole(part, known):
        return part, 1.0
    name, colon, number = part.rpartition(":")
    if not colon:
        name, number = part, "1"
    try:
        weight = float(number)
    except ValueError as error:
        raise XFactorError(f"`adapter={text}`: {number!r} is not a weight; write NAME:WEIGHT, e.g. x:0.7") from error
    if not name or name == BASE:
        raise XFactorError(f"`adapter={text}`: a part has no adapter; write NAME:WEIGHT, e.g. x:0.7")
    return name, weight
