"""Patterns over text: words, phrases, characters and scripts, each with the regular expression that it stands for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ..errors import XFactorError, text_of

KINDS = ("phrase", "char", "script")


@dataclass(frozen=True)
class Pattern:
    """One thing that is counted in a text, however the text is cut into tokens.

    A phrase is one or more words. It is found where it is no part of a longer word, unless a `*` stands at that end
    ("delv*" is in "delving"); a space in it stands for any white space. A char is one character anywhere; a script
    is any character of a writing system by Unicode's name or code ("Han", "Cyrillic").

    Raises:
        XFactorError: an unknown kind or script, no text, or a `*` elsewhere than at an end.
    """

    text: str
    kind: str = "phrase"
    ignore_case: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise XFactorError(f"unknown kind of pattern {self.kind!r}; known: {', '.join(KINDS)}")
        if not isinstance(self.text, str) or not self.text.strip(" *" if self.kind == "phrase" else ""):
            raise XFactorError(f"a pattern needs text; got {self.text!r}")
        text = unicodedata.normalize("NFC", self.text)
        if self.kind == "phrase":
            text = " ".join(text.split())
            if "*" in self._body(text):
                raise XFactorError(f"phrase {self.text!r}: `*` may stand at its start and at its end only")
        elif self.kind == "char":
            if len(text) != 1:
                raise XFactorError(f"`chars` takes single characters; got {self.text!r}")
            object.__setattr__(self, "ignore_case", False)
        else:
            object.__setattr__(self, "ignore_case", False)
            try:
                regex.compile(rf"\p{{Script={text}}}")
            except regex.error as error:
                raise XFactorError(f"`script`: Unicode knows no script {self.text!r}; e.g. Han, Cyrillic") from error
        object.__setattr__(self, "text", text)

    @staticmethod
    def _body(text: str) -> str:
        return text.removeprefix("*").removesuffix("*").strip()

    @property
    def body(self) -> str:
        """The text without the `*` at its ends."""
        return self._body(self.text) if self.kind == "phrase" else self.text

    @property
    def bounded(self) -> tuple[bool, bool]:
        """Whether a word may not go on before it, and after it."""
        if self.kind != "phrase":
            return False, False
        body = self.body
        return (
            not self.text.startswith("*") and is_word(body[0]),
            not self.text.endswith("*") and is_word(body[-1]),
        )

    @property
    def regex(self) -> str:
        """The same as a regular expression for `re`, or, of a script, for `regex`: `re` has none."""
        if self.kind == "script":
            return rf"\p{{Script={self.text}}}"
        if self.kind == "char":
            return re.escape(self.text)
        left, right = self.bounded
        inner = r"\s+".join(map(re.escape, self.body.split(" ")))
        return (r"(?<!\w)" if left else "") + inner + (r"(?!\w)" if right else "")

    def record(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"kind": self.kind, "text": self.text, "ignore_case": self.ignore_case}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Pattern:
        """The inverse of `record`."""
        return cls(record.get("text", ""), record.get("kind", ""), record.get("ignore_case", True) is True)


def is_word(character: str) -> bool:
    """Whether a word may hold the character: `re`'s \\w."""
    return character.isalnum() or character == "_"


def phrases(lines: Iterable[str], *, ignore_case: bool = True) -> tuple[Pattern, ...]:
    """A phrase a line, sorted; empty lines and comments (# at the line's start) are left out.

    Raises:
        XFactorError: a line is no phrase, or none is left.
    """
    kept = sorted({line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")})
    if not kept:
        raise XFactorError("`phrases` holds no phrase (one a line is expected)")
    return tuple({pattern: None for pattern in (Pattern(line, ignore_case=ignore_case) for line in kept)})


def read_phrases(path: str | Path, *, ignore_case: bool = True) -> tuple[Pattern, ...]:
    """`phrases` of a file; raises XFactorError where it cannot be read as UTF-8 text."""
    return phrases(text_of(Path(path), f"`phrases` {path}").splitlines(), ignore_case=ignore_case)


def found(pattern: Pattern, text: str) -> list[tuple[int, int]]:
    """(start, end) of every occurrence in a text, those that overlap too: the definition of a match."""
    if pattern.kind == "script":
        return [m.span() for m in regex.finditer(pattern.regex, text)]
    flags = re.IGNORECASE if pattern.ignore_case else 0
    return [m.span(1) for m in re.finditer(f"(?=({pattern.regex}))", text, flags)]


def names(patterns: Sequence[Pattern]) -> list[str]:
    """Patterns as people write them."""
    return [f"script {p.text}" if p.kind == "script" else p.text for p in patterns]
