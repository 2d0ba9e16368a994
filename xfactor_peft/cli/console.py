"""Where everything is printed: nothing is read as markup, and no control character reaches a terminal.

Names, rules, paths and errors come from strangers' files as well, so no string is trusted, wherever it stands: alone,
in a table, in a panel. Only styles given apart from the text (`style=`, `Text`) have an effect.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from ..tokens.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tokens.token_set import TokenSet

MEMBER_STYLE = "bold black on yellow"
NOTHING = "(nothing: the model ended the text at once)"


class PlainConsole(Console):
    """Prints what strings hold, and marks for what a terminal would take as an order; rich's own orders pass."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before it is measured

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else printable(text), style, control)


console = PlainConsole(markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """One line, however long."""
    click.echo(printable(text), file=sys.stdout)


def highlighted(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]) -> Text:
    """The text of `ids`, with members of any of the sets marked."""
    from ..tokens.highlight import marked_parts

    text = Text() if (ids := list(ids)) else Text(NOTHING, style="dim")
    for part, inside in marked_parts(tokenizer, ids, sets):
        text.append(part, style=MEMBER_STYLE if inside else "")
    return text
