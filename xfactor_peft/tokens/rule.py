"""The rule that chooses a token set: contains a text, matches a pattern, is one of some words or ids."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import XFactorError
from .scan import found_in

KINDS = ("contains", "regex", "words", "token-ids")


@dataclass(frozen=True)
class Rule:
    """Which tokens are meant, whatever the vocabulary.

    Text is compared in Unicode's composed form (NFC), whichever way it was typed or is spelt in the vocabulary; without
    regard to case, one character answers to one: "ß" to "ẞ", never to "ss". What is written in ASCII alone is looked
    for in the vocabulary's text as it is, and folded by `str.casefold`, as it was when adapters were first stored.

    Attributes:
        kind: "contains" (a text in the token), "regex" (a pattern found in it), "words" (the token is one of them, with
            or without the space before it) or "token-ids".
        value: the text, the pattern, or a tuple of the words or ids, sorted and without duplicates.
        ignore_case: not for token ids.

    Raises:
        XFactorError: an unknown kind, a value of another type, or an empty one. (A pattern is compiled by `chosen`,
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
            object.__setattr__(self, "value", _composed(self.value))
            return
        item = str if self.kind == "words" else int
        if not isinstance(self.value, list | tuple) or any(type(part) is not item for part in self.value):
            raise XFactorError(f"`{self.kind.replace('-', '_')}` must be a list of {item.__name__}; got {self.value!r}")
        parts = {_composed(part.strip()) for part in self.value} - {""} if self.kind == "words" else set(self.value)
        if self.kind == "words" and not parts:
            raise XFactorError("`words` holds no word (one word a line is expected)")
        object.__setattr__(self, "value", tuple(sorted(parts)))

    @classmethod
    def read(cls, kind: str, text: str | Path, *, ignore_case: bool = False) -> Rule:
        """The rule as a user writes it: for words (one a line) and token ids, `text` names a file or lists them: "a,b".

        Raises:
            XFactorError: the file cannot be read, or as for the rule itself.
        """
        if kind not in ("words", "token-ids"):
            return cls(kind, str(text), ignore_case)
        where = f"`{kind.replace('-', '_')}` {text}"
        try:
            content = _file_or_list(str(text))
            value = content.splitlines() if kind == "words" else [int(part) for part in content.split()]
        except FileNotFoundError as error:
            raise XFactorError(f"{where}: this file does not exist; give one, or a list such as a,b") from error
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
            more = f", ... ({len(self.value)} given)" if len(self.value) > 4 else ""
            return f"{self.kind} {', '.join(map(str, self.value[:4]))}{more}"
        return f"{self.kind} {self.value!r}" + (" (any case)" if self.ignore_case else "")

    def chosen(self, texts: Mapping[int, str]) -> list[int]:
        """The tokens that are meant, by their texts; not for token ids.

        Raises:
            XFactorError: the pattern is no regular expression, or takes too long (see `scan.found_in`).
        """
        if self.kind == "words":
            return [i for i, text in texts.items() if self.words_of(text)]
        if self.kind == "regex":
            forms = list(texts.values()) if self.value.isascii() else [_composed(text) for text in texts.values()]
            ids = list(texts)
            return [ids[place] for place in found_in(self.value, forms, ignore_case=self.ignore_case)]
        part, plain = self._form(self.value, self.value.isascii()), self.value.isascii()
        return [i for i, text in texts.items() if part in self._form(text, plain)]

    def words_of(self, text: str) -> list[str]:
        """Which of the rule's words a token's text is, with or without the space beside it."""
        word = text[1:] if text.startswith(" ") else text.removesuffix(" ")
        table = self._words
        return list({w: None for plain in (True, False) for w in table.get((plain, self._form(word, plain)), ())})

    @cached_property
    def _words(self) -> dict[tuple[bool, str], list[str]]:
        """The rule's words by (whether in ASCII alone, the form in which they are compared)."""
        table: dict[tuple[bool, str], list[str]] = {}
        for word in self.value:
            table.setdefault((word.isascii(), self._form(word, word.isascii())), []).append(word)
        return table

    def _form(self, text: str, plain: bool) -> str:
        """As text is compared: `plain` with what is written in ASCII alone."""
        if plain:
            return text.casefold() if self.ignore_case else text
        return _composed("".join(map(_folded, _composed(text)))) if self.ignore_case else _composed(text)


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _folded(character: str) -> str:
    """Without case, one character for one: Unicode's simple folding, e.g. "ẞ" -> "ß"; "İ" has none."""
    return next((form for form in (character.casefold(), character.lower()) if len(form) == 1), character)


def _file_or_list(text: str) -> str:
    """The content of the file of this name, or the items of a list, one a line.

    A single word that looks like a path (with a "/" or a ".") is one that is missing, not a word.
    """
    if "," in text and not os.path.isfile(text):
        return text.replace(",", "\n")
    if os.path.exists(text) or "/" in text or "." in text:
        return Path(text).read_text(encoding="utf-8-sig")
    return text
