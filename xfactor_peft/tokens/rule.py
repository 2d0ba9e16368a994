"""The rule that chooses a token set: contains a text, matches a pattern, is one of some words or ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import XFactorError
from .regex_guard import slow_regex

KINDS = ("contains", "regex", "words", "token-ids")


@dataclass(frozen=True)
class Rule:
    """Which tokens are meant, whatever the vocabulary.

    Attributes:
        kind: "contains" (a text in the token), "regex" (a pattern found in it), "words" (the token is one of them, with
            or without the space before it) or "token-ids".
        value: the text, the pattern, or a tuple of the words or ids, sorted and without duplicates.
        ignore_case: not for token ids.

    Raises:
        XFactorError: an unknown kind, a value of another type, or an empty one. (A pattern is compiled by `matcher`,
            so that a record stays readable on a Python that no longer takes its pattern.)
    """

    kind: str
    value: Any
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise XFactorError(f"unknown token-set rule {self.kind!r}; known: {', '.join(KINDS)}")
        if not isinstance(self.ignore_case, bool):
            raise XFactorError(f"`ignore_case` must be true or false; got {self.ignore_case!r}")
        if self.ignore_case and self.kind == "token-ids":
            raise XFactorError("`ignore_case` has no meaning with `token_ids`; drop it")
        if self.kind in ("contains", "regex"):
            if not isinstance(self.value, str):
                raise XFactorError(f"`{self.kind}` must be a text; got {self.value!r}")
            if self.kind == "contains" and not self.value:
                raise XFactorError("`contains` needs at least one character")
            return
        item = str if self.kind == "words" else int
        if not isinstance(self.value, list | tuple) or any(type(part) is not item for part in self.value):
            raise XFactorError(f"`{self.kind.replace('-', '_')}` must be a list of {item.__name__}; got {self.value!r}")
        parts = {part.strip() for part in self.value} - {""} if self.kind == "words" else set(self.value)
        if self.kind == "words" and not parts:
            raise XFactorError("`words` holds no word (one word a line is expected)")
        object.__setattr__(self, "value", tuple(sorted(parts)))

    @classmethod
    def read(cls, kind: str, text: str | Path, *, ignore_case: bool = False) -> Rule:
        """The rule as a user writes it: for words (one a line) and token ids, `text` names a file.

        Raises:
            XFactorError: the file cannot be read, or as for the rule itself.
        """
        if kind not in ("words", "token-ids"):
            return cls(kind, str(text), ignore_case)
        where = f"`{kind.replace('-', '_')}` {text}"
        try:
            content = Path(text).read_text(encoding="utf-8")
            value = content.splitlines() if kind == "words" else [int(part) for part in content.split()]
        except (OSError, UnicodeDecodeError) as error:
            raise XFactorError(f"{where}: cannot be read as UTF-8 text: {error}") from error
        except ValueError as error:
            raise XFactorError(f"{where}: expected whole numbers, {error}") from error
        return cls(kind, value, ignore_case)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Rule:
        """The inverse of `record`; keys that it does not know are left out."""
        return cls(record.get("kind", ""), record.get("value"), record.get("ignore_case", False))

    def record(self) -> dict[str, Any]:
        """JSON-serialisable, as it is stored beside an adapter."""
        if self.kind == "token-ids":
            return {"kind": self.kind, "value": list(self.value)}
        value = list(self.value) if self.kind == "words" else self.value
        return {"kind": self.kind, "value": value, "ignore_case": self.ignore_case}

    def describe(self) -> str:
        """In words, for messages."""
        if self.kind in ("words", "token-ids"):
            return f"{self.kind} ({len(self.value)} given)"
        return f"{self.kind} {self.value!r}" + (" (any case)" if self.ignore_case else "")

    def word_form(self, text: str) -> str:
        """A word, or a token's text, as words are compared: without its leading space, and folded if asked."""
        text = text.removeprefix(" ")
        return text.casefold() if self.ignore_case else text

    def matcher(self) -> Callable[[str], bool]:
        """Whether a token's text is meant; not for token ids.

        Raises:
            XFactorError: the pattern is no regular expression, or one that may take exponential time.
        """
        if self.kind == "regex":
            return _compiled(self.value, self.ignore_case)
        if self.kind == "words":
            words = {self.word_form(word) for word in self.value}
            return lambda text: self.word_form(text) in words
        fold = str.casefold if self.ignore_case else str
        part = fold(self.value)
        return lambda text: part in fold(text)


def _compiled(pattern: str, ignore_case: bool) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise XFactorError(f"`regex` {pattern!r} is not a regular expression: {error}") from error
    if slow_regex(pattern):
        raise XFactorError(
            f"`regex` {pattern!r} repeats a repeat or an alternative, which can take forever; write it without"
        )
    return lambda text: bool(compiled.search(text))
