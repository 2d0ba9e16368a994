"""Token sets: which vocabulary entries an adapter prefers or avoids, from what rule, with a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import XFactorError
from .ends import special_ids
from .rule import Rule
from .token_bytes import markers, token_texts

_THESE_IDS = Rule("token-ids", ())


@dataclass(frozen=True)
class TokenSet:
    """A set S of token ids, a proper non-empty subset of a vocabulary without its special tokens.

    Attributes:
        ids: sorted ids of the members.
        vocab_size: V, the number of rows of the model's output embedding.
        rule: how the set was chosen; `TokenSet.from_rule` makes the set again from it. Without one: exactly these ids.
        texts: the members' texts, in the order of `ids`.

    Raises:
        XFactorError: the set is empty, holds every token, or has an id outside [0, V).
    """

    ids: tuple[int, ...]
    vocab_size: int
    rule: Rule = _THESE_IDS
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(sorted(set(self.ids))))
        if self.rule == _THESE_IDS:
            object.__setattr__(self, "rule", Rule("token-ids", self.ids))
        if not self.ids:
            raise XFactorError(f"no token matches {self.describe()}; widen the rule")
        if self.ids[0] < 0 or self.ids[-1] >= self.vocab_size:
            bad = self.ids[0] if self.ids[0] < 0 else self.ids[-1]
            raise XFactorError(f"token id {bad} is outside the vocabulary of {self.vocab_size} tokens")
        if len(self.ids) == self.vocab_size:
            raise XFactorError(f"{self.describe()} matches the whole vocabulary; narrow the rule")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def contains(
        cls, tokenizer: Tokenizer, text: str = "X", *, ignore_case: bool = False, vocab_size: int | None = None
    ) -> TokenSet:
        """Every token whose text contains `text`: {i : text in token_i}."""
        return cls.from_rule(tokenizer, Rule("contains", text, ignore_case), vocab_size=vocab_size)

    @classmethod
    def regex(
        cls, tokenizer: Tokenizer, pattern: str, *, ignore_case: bool = False, vocab_size: int | None = None
    ) -> TokenSet:
        """Every token in which the regular expression is found (`re.search`; anchor with ^ and $)."""
        return cls.from_rule(tokenizer, Rule("regex", pattern, ignore_case), vocab_size=vocab_size)

    @classmethod
    def words(
        cls, tokenizer: Tokenizer, words: Iterable[str], *, ignore_case: bool = False, vocab_size: int | None = None
    ) -> TokenSet:
        """Every token that is one of the words, with or without the space before it; see `without_token`."""
        return cls.from_rule(tokenizer, Rule("words", tuple(words), ignore_case), vocab_size=vocab_size)

    @classmethod
    def token_ids(cls, tokenizer: Tokenizer, ids: Iterable[int], *, vocab_size: int | None = None) -> TokenSet:
        """Exactly these ids. Special tokens are refused, since they are never in a set."""
        return cls.from_rule(tokenizer, Rule("token-ids", tuple(ids)), vocab_size=vocab_size)

    @classmethod
    def from_rule(cls, tokenizer: Tokenizer, rule: Rule, *, vocab_size: int | None = None) -> TokenSet:
        """The tokens of this vocabulary that a rule means.

        Raises:
            XFactorError: none or all of them, a special token, or a pattern that `Rule.chosen` refuses, or a vocabulary
                whose spelling is not known.
        """
        size, texts = vocab_size or len(tokenizer), token_texts(tokenizer)
        if rule.kind == "token-ids":
            if special := sorted(special_ids(tokenizer).intersection(rule.value)):
                raise XFactorError(f"`token_ids`: {special[0]} is a special token, which a token set never holds")
            texts |= markers(tokenizer)
            return cls(rule.value, size, rule, tuple(texts.get(i, "") for i in rule.value))
        chosen = rule.chosen({i: text for i, text in texts.items() if i < size and text})
        if len(chosen) == sum(i < size for i in texts):
            raise XFactorError(f"{rule.describe()} matches the whole vocabulary; narrow the rule")
        return cls(tuple(chosen), size, rule, tuple(texts[i] for i in chosen))

    @property
    def without_token(self) -> list[str]:
        """The rule's words that the vocabulary splits into several tokens, and that therefore add nothing."""
        if self.rule.kind != "words":
            return []
        found = {word for text in self.texts for word in self.rule.words_of(text)}
        return [word for word in self.rule.value if word not in found]

    def mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """1[i in S] for i in [0, V); bool, shape (V,)."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        mask[torch.tensor(self.ids, device=device)] = True
        return mask

    def share(self, ids: Sequence[int]) -> float:
        """R of one text: the share of `ids` that are members; 0 without any."""
        return sum(map(set(self.ids).__contains__, ids)) / max(1, len(ids))

    @property
    def hash(self) -> str:
        """SHA-256 over the vocabulary's size and the ids; equal sets have equal hashes, whatever their rule."""
        return hashlib.sha256(json.dumps([self.vocab_size, self.ids]).encode()).hexdigest()

    def describe(self) -> str:
        """The rule in words, for messages."""
        return self.rule.describe()

    def record(self) -> dict[str, Any]:
        """What is stored beside an adapter."""
        rule = self.rule.record()
        if self.rule.kind == "words":
            rule["without_token"] = self.without_token
        return {"rule": rule, "size": len(self), "vocab_size": self.vocab_size, "hash": self.hash}
