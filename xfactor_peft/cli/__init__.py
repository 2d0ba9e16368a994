"""The command line: parse, call a function that returns data, print."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..lowmem.imports import put_off_compiler
from .help import explained, write_examples

_COMMANDS = {
    "train": "Train an adapter (or all weights) towards a token set.",
    "unslop": "Train an adapter without the words and phrases that models overuse.",
    "plan": "Predict memory and time of a training run before anything is loaded.",
    "generate": "Continue prompts with the base and with adapters, side by side.",
    "play": "Generate interactively and swap adapters in place.",
    "playground": "Try adapters in the browser, side by side with the base.",
    "eval": "Score an adapter: R, set mass, KL from the base, perplexity.",
    "adapters": "List, show, verify, rename, remove, merge and compare adapters.",
    "export": "Write an adapter for other programs: merged, GGUF, ONNX, logit bias.",
    "serve": "Serve adapters on a GGUF file with llama.cpp.",
    "tokens": "Show a token set and the base model's own mass on it.",
    "cache": "List the files that weights are mapped from, or remove them.",
    "env": "Print versions and hardware, for a bug report.",
}
_COMPILES = ("export",)
"""Commands that may want torch's compiler; the others need not wait for it."""
_EXAMPLES = (
    "xfactor train --model demo --contains X --target-rate 10%",
    'xfactor generate --adapter none --adapter X-rate-0.1-head "Once upon a time"',
    "xfactor play --adapter X-rate-0.1-head",
    "xfactor COMMAND --help",
)


class _LazyGroup(click.Group):
    """Imports a command when it is needed, so that --help takes no torch, and turns user errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        if name not in _COMPILES:
            put_off_compiler()
        module = importlib.import_module(f".{name}", __package__)
        gc.freeze()  # imported code stays, so that collections between phases need not walk through it
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, _EXAMPLES)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = _COMMANDS.items()  # without an import of any
        return [CompletionItem(name, help=text) for name, text in items if name.startswith(incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else ctx.command_path
            said = explained(error, _COMMANDS)
            raise _UserError(f"{said}{'' if said.endswith(('.', '?', ')')) else '.'} See `{where} --help`.") from error
        except KeyboardInterrupt as error:
            from ..checkpoint.interruption import Interrupted

            if not isinstance(error, Interrupted):
                raise
            click.echo(f"\n{_UserError(self._in_flags(ctx, error)).message}", file=sys.stderr)
            ctx.exit(error.status)
        except ValueError as error:
            from ..errors import XFactorError

            if not isinstance(error, XFactorError):
                raise
            raise _UserError(self._in_flags(ctx, error)) from error

    @staticmethod
    def _in_flags(ctx: click.Context, error: BaseException) -> str:
        """The error on one line, in the command line's own words."""
        from .flags import RESUME, as_flags

        return as_flags(" ".join(str(error).split()), ctx.meta.get(RESUME))


def _writable(stream: Any) -> None:
    """Let a stream whose encoding lacks a character write its number instead of failing half-way."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """This package's own warnings as one line of text; of others, as Python has it."""
    from ..errors import XFactorWarning
    from ..tokens.printable import printable

    if issubclass(category, XFactorWarning):
        click.echo(printable(f"Note: {message}"), err=True)
    else:
        _python_shows(message, category, *where)


_python_shows = warnings.showwarning


class _UserError(click.ClickException):
    """One line, exit status 2; what it quotes may come from a stranger's file."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        from ..tokens.printable import printable

        super().__init__(printable(message))

    def show(self, file: Any = None) -> None:
        super().show(file or sys.stderr)  # click would write UTF-8 where another encoding was asked for


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="xfactor-peft")
def main() -> None:
    """Teach a causal language model to prefer, or avoid, chosen tokens."""
    _writable(sys.stdout)
    _writable(sys.stderr)
    # Quiet the libraries: their notes are not about anything that the user did.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate|bitsandbytes)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
