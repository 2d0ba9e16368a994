"""Where everything is printed: nothing is read as markup, and no control character reaches a terminal.

Names, rules, paths and errors come from strangers' files as well, so no string is trusted, wherever it stands: alone,
in a table, in a panel. Only styles given apart from the text (`style=`, `Text`) have an effect.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, ConsoleDimensions
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..tokens.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tokens.token_set import TokenSet

MEMBER_STYLE = "bold black on yellow"
PIPE_WIDTH = 10_000
NOTHING = "(nothing: the model ended the text at once)"


class PlainConsole(Console):
    """Prints what strings hold, and marks for what a terminal would take as an order; rich's own orders pass.

    On a pipe lines are as long as they are: nothing is wrapped, and nothing is drawn.
    """

    @property  # type: ignore[misc]  # rich's own can be set, which nothing here does
    def size(self) -> ConsoleDimensions:
        return super().size if self.is_terminal else ConsoleDimensions(PIPE_WIDTH, 25)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before it is measured

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else printable(text), style, control)


console = PlainConsole(markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """One line, however long."""
    click.echo(printable(text), file=console.file)


def json_option(function: Any) -> Any:
    """--json."""
    return click.option(
        "--json", "as_json", is_flag=True, callback=_to_stderr,
        help="Print the results as JSON; all else goes to standard error.",
    )(function)  # fmt: skip


def _to_stderr(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value:
        console.stderr = True
        ctx.call_on_close(lambda: setattr(console, "stderr", False))
    return value


def json_to(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """For a --json that may name a file: only without one is standard output kept for it."""
    _to_stderr(ctx, param, value == "-")
    return value


def print_json(record: Any) -> None:
    """One JSON value on standard output."""
    click.echo(json.dumps(record, indent=2, ensure_ascii=False), file=sys.stdout)


def print_columns(labels: list[str], columns: dict[str, list[str]]) -> None:
    """A table of named columns; where it is wider than the terminal, one column below the other."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, *row in zip(labels, *columns.values(), strict=True):
        table.add_row(label, *row)
    if console.measure(table).maximum <= console.width:
        console.print(table)
        return
    for name, values in columns.items():
        console.print(name, style="bold")
        for label, value in zip(labels, values, strict=True):
            console.print(f"  {label}: {value}")


def print_text(title: str, body: Text, below: str) -> None:
    """A text under its title, with a line about it: in a frame on a terminal, plain on a pipe."""
    if not console.is_terminal:
        console.print(f"{title}\n{body.plain}\n({below})\n", soft_wrap=True)
        return
    console.print(Panel(body, title=Text(printable(title)), title_align="left"))
    console.print(f"  {below}", style="dim")


def highlighted(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]) -> Text:
    """The text of `ids`, with members of any of the sets marked."""
    from ..tokens.highlight import marked_parts

    text = Text() if (ids := list(ids)) else Text(NOTHING, style="dim")
    for part, inside in marked_parts(tokenizer, ids, sets):
        text.append(part, style=MEMBER_STYLE if inside else "")
    return text
