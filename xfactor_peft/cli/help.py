"""What every command of `xfactor` has: help in groups, examples, and a suggestion where a word is misspelt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import click

FIRST, OTHER = "The options that matter first", "Other options"


class Command(click.Command):
    """A command whose help shows `first` (names of options) first, the others in groups, and `examples` at the end."""

    def __init__(self, *args: Any, first: Sequence[str] = (), examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first, self.examples = tuple(first), tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {FIRST if self.first else OTHER: []}
        params = sorted(self.get_params(ctx), key=lambda p: self.first.index(p.name) if p.name in self.first else 99)
        for param in params:
            if (record := param.get_help_record(ctx)) is not None and record[1]:  # an argument stands in the first line
                group = FIRST if param.name in self.first else getattr(param, "group", OTHER)
                sections.setdefault(group, []).append(record)
        rest = sections.pop(OTHER, [])
        for title, records in {**sections, OTHER if sections else "Options": rest}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def write_examples(formatter: click.HelpFormatter, examples: Iterable[str]) -> None:
    """Command lines, to be copied as they are: never wrapped."""
    if examples := tuple(examples):
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def grouped(function: Any, title: str, before: int) -> Any:
    """Put the options that were added to `function` since it had `before` of them under `title` in the help."""
    for param in getattr(function, "__click_params__", [])[before:]:
        param.group = title
    return function


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'train'?", or nothing where no known word is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def explained(error: click.UsageError, commands: Iterable[str]) -> str:
    """A mistake of the command line, with the nearest right word where click names none itself."""
    message = error.format_message()
    if "id you mean" in message:
        return message
    if match := re.fullmatch(r"No such command '(.*)'\.", message):
        return message + did_you_mean(match[1], commands)
    kind = getattr(getattr(error, "param", None), "type", None)
    if isinstance(kind, click.Choice) and (match := re.search(r"'([^']*)' is not one of", message)):
        return message + did_you_mean(match[1], map(str, kind.choices))
    return message
