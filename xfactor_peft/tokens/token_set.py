"""Token sets: which vocabulary entries an adapter prefers or avoids, from what rule, with a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..adapters.record import slow_regex
from ..errors import XFactorError
from .token_bytes import special_ids, token_texts


@dataclass(frozen=True)
class TokenSet:
    """A set S of token ids, a proper non-empty subset of a vocabulary without its special tokens.

    Attributes:
        ids: sorted ids of the members.
        vocab_size: V, the number of rows of the model's output embedding.
        rule: how the set was chosen, JSON-serialisable; `TokenSet.from_rule` makes the set again from it.
        texts: the members' texts, in the order of `ids`.

    Raises:
        XFactorError: the set is empty, holds every token, or has an id outside [0, V).
    """

    ids: tuple[int, ...]
    vocab_size: int
    rule: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(sorted(set(self.ids))))
        if not self.ids:
            raise XFactorError(f"no token matches {self.describe()}; look at `xfactor tokens` and widen the rule")
        if self.ids[0] < 0 or self.ids[-1] >= self.vocab_size:
            bad = self.ids[0] if self.ids[0] < 0 else self.ids[-1]
            raise XFactorError(f"token id {bad} is outside the vocabulary of {self.vocab_size} tokens")
        if len(self.ids) == self.vocab_size:
            raise XFactorError(f"{self.describe()} matches the whole vocabulary; narrow the rule")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def contains(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str = "X",
        *,
        ignore_case: bool = False,
        vocab_size: int | None = None,
    ) -> TokenSet:
        """Every token whose text contains `text`: {i : text in token_i}."""
        if not text:
            raise XFactorError("--contains needs at least one character")
        rule = {"kind": "contains", "value": text, "ignore_case": ignore_case}
        if ignore_case:
            folded = text.casefold()
            return cls._matching(tokenizer, lambda token: folded in token.casefold(), rule, vocab_size)
        return cls._matching(tokenizer, lambda token: text in token, rule, vocab_size)

    @classmethod
    def regex(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        pattern: str,
        *,
        ignore_case: bool = False,
        vocab_size: int | None = None,
    ) -> TokenSet:
        """Every token in which the regular expression is found (`re.search`; anchor with ^ and $)."""
        try:
            compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except re.error as error:
            raise XFactorError(f"--regex {pattern!r} is not a regular expression: {error}") from error
        if slow_regex(pattern):
            raise XFactorError(
                f"--regex {pattern!r} repeats a repeat or an alternative, which can take for ever; write it without"
            )
        rule = {"kind": "regex", "value": pattern, "ignore_case": ignore_case}
        return cls._matching(tokenizer, lambda token: bool(compiled.search(token)), rule, vocab_size)

    @classmethod
    def words(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        words: Iterable[str],
        *,
        ignore_case: bool = False,
        vocab_size: int | None = None,
    ) -> TokenSet:
        """Every token that is one of the words, with or without the space before it.

        A word that the vocabulary splits into several tokens has no token of its own and adds nothing;
        `rule["without_token"]` lists those words.
        """
        wanted = sorted({word.strip() for word in words if word.strip()})
        if not wanted:
            raise XFactorError("--words: the file holds no word (one word a line is expected)")
        fold: Callable[[str], str] = str.casefold if ignore_case else str
        keys = {fold(word) for word in wanted}
        found = {fold(text.removeprefix(" ")) for text in token_texts(tokenizer).values()} & keys
        missing = [word for word in wanted if fold(word) not in found]
        rule = {"kind": "words", "value": wanted, "ignore_case": ignore_case, "without_token": missing}
        return cls._matching(tokenizer, lambda token: fold(token.removeprefix(" ")) in keys, rule, vocab_size)

    @classmethod
    def token_ids(
        cls, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], *, vocab_size: int | None = None
    ) -> TokenSet:
        """Exactly these ids. Special tokens are refused, since they are never in a set."""
        chosen = sorted(set(ids))
        special = sorted(set(chosen) & special_ids(tokenizer))
        if special:
            raise XFactorError(f"--token-ids: {special[0]} is a special token, which a token set never holds")
        texts = token_texts(tokenizer)
        size = vocab_size or len(tokenizer)
        rule = {"kind": "token-ids", "value": chosen}
        return cls(tuple(chosen), size, rule, tuple(texts.get(i, "") for i in chosen))

    @classmethod
    def from_rule(
        cls, tokenizer: PreTrainedTokenizerBase, rule: dict[str, Any], *, vocab_size: int | None = None
    ) -> TokenSet:
        """Make a set again from `TokenSet.rule`; raises XFactorError for an unknown kind."""
        kind, fold = rule.get("kind"), bool(rule.get("ignore_case", False))
        value: Any = rule.get("value")  # a text, or a list of words or ids
        if kind == "contains":
            return cls.contains(tokenizer, value, ignore_case=fold, vocab_size=vocab_size)
        if kind == "regex":
            return cls.regex(tokenizer, value, ignore_case=fold, vocab_size=vocab_size)
        if kind == "words":
            return cls.words(tokenizer, value, ignore_case=fold, vocab_size=vocab_size)
        if kind == "token-ids":
            return cls.token_ids(tokenizer, value, vocab_size=vocab_size)
        raise XFactorError(f"unknown token-set rule {kind!r}; known: contains, regex, words, token-ids")

    @classmethod
    def _matching(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        predicate: Callable[[str], bool],
        rule: dict[str, Any],
        vocab_size: int | None,
    ) -> TokenSet:
        size = vocab_size or len(tokenizer)
        texts = token_texts(tokenizer)
        chosen = [i for i, text in texts.items() if i < size and text and predicate(text)]
        if len(chosen) == sum(i < size for i in texts):
            raise XFactorError(f"{_describe(rule)} matches the whole vocabulary; narrow the rule")
        return cls(tuple(chosen), size, rule, tuple(texts[i] for i in sorted(chosen)))

    def mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """1[i in S] for i in [0, V); bool, shape (V,)."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        mask[torch.tensor(self.ids, device=device)] = True
        return mask

    @property
    def hash(self) -> str:
        """SHA-256 over the vocabulary's size and the ids; equal sets have equal hashes, whatever their rule."""
        return hashlib.sha256(json.dumps([self.vocab_size, self.ids]).encode()).hexdigest()

    def describe(self) -> str:
        """The rule in words, for messages."""
        return _describe(self.rule)

    def record(self) -> dict[str, Any]:
        """What is stored beside an adapter."""
        return {"rule": self.rule, "size": len(self), "vocab_size": self.vocab_size, "hash": self.hash}


def _describe(rule: dict[str, Any]) -> str:
    kind, value = rule.get("kind", "token ids"), rule.get("value", "")
    if kind in ("words", "token-ids"):
        return f"{kind} ({len(value)} given)"
    return f"{kind} {value!r}" + (" (any case)" if rule.get("ignore_case") else "")


def read_words(path: Path) -> list[str]:
    """Read one word a line, UTF-8; raises XFactorError when the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise XFactorError(f"--words {path}: cannot be read as UTF-8 text: {error}") from error


def read_token_ids(path: Path) -> list[int]:
    """Read whitespace-separated ids; raises XFactorError on anything that is not a whole number."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise XFactorError(f"--token-ids {path}: cannot be read: {error}") from error
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise XFactorError(f"--token-ids {path}: expected whole numbers, {error}") from error
