"""What options take besides numbers and texts: rates as 10%, lists of words, names of adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..errors import XFactorError
from ..options import parse_rate


class Rate(click.ParamType):
    """A share: 0.1 or 10%."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_rate(str(value))
        except XFactorError as error:
            self.fail(str(error), param, ctx)


class Listed(click.ParamType):
    """Words or ids: a file with one a line, a list such as fox,dog, or - for standard input."""

    name = "list"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..tokens.rule import Rule
        from .flags import as_flags

        text = ",".join(from_stdin().splitlines()) if str(value) == "-" else str(value)
        try:
            Rule.read(self.kind, text)
        except XFactorError as error:
            raise XFactorError(as_flags(str(error))) from error
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class AdapterName(click.ParamType):
    """An adapter's name, which a shell completes."""

    name = "adapter"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        root = Path(ctx.params.get("adapters_dir") or "adapters")
        names = sorted(path.parent.name for path in root.glob("[!.]*/adapter_config.json"))
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


RATE, ADAPTER = Rate(), AdapterName()


def from_stdin() -> str:
    """All of standard input, without the line end that a shell adds.

    Raises:
        XFactorError: it is closed, or no UTF-8 text.
    """
    try:
        return sys.stdin.read().removesuffix("\n")
    except (AttributeError, ValueError) as error:
        raise XFactorError(f"- reads standard input, which cannot be read as text here: {error}") from error
