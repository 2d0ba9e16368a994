"""Where everything is printed, and how set tokens look in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..tokens import TokenSet

console = Console(highlight=False)
MEMBER_STYLE = "bold black on yellow"


def highlighted(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]) -> Text:
    """The text of `ids`, with members of any of the sets marked.

    Runs of members and of others are decoded together, so that characters made of several tokens stay whole.
    """
    members = {i for tokens in sets for i in tokens.ids}
    text, run, inside = Text(), [], False
    for i in [*ids, None]:
        if run and (i is None or (i in members) != inside):
            text.append(_printable(tokenizer.decode(run)), style=MEMBER_STYLE if inside else "")
            run = []
        if i is not None:
            inside = i in members
            run.append(i)
    return text


def _printable(text: str) -> str:
    """Without control characters, which generated text could use to drive the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
