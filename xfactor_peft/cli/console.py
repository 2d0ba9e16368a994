"""Where everything is printed, and how set tokens look in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..tokens.highlight import marked_parts
from ..tokens.token_set import TokenSet

console = Console(highlight=False)
MEMBER_STYLE = "bold black on yellow"


def highlighted(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]) -> Text:
    """The text of `ids`, with members of any of the sets marked."""
    text = Text()
    for part, inside in marked_parts(tokenizer, ids, sets):
        text.append(part, style=MEMBER_STYLE if inside else "")
    return text
