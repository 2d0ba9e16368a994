"""The options of `xfactor train` that save a run and resume it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .common import Command, apply_options
from .config import given
from .flags import RESUME

_PATHS = ("output", "words", "token_ids", "log_dir")
_NOT_KEPT = ("resume", "force")


def resuming_options(function: Command) -> Command:
    """--save-every, --resume."""
    return apply_options(
        [
            click.option("--save-every", type=int, default=50, show_default=True, metavar="N",
                         help="Steps between checkpoints; 0: only at the end and when stopped."),
            click.option("--resume", type=click.Path(path_type=Path), metavar="RUN",
                         help="Continue a run that was stopped, e.g. adapters/X-lora-r8; takes no other option."),
        ],
        function,
        "Checkpoints",
    )  # fmt: skip


def name_resume_command(output: Path) -> None:
    """Let messages that say `resume=True` name the whole command."""
    click.get_current_context().meta[RESUME] = f"xfactor train --resume {shlex.quote(str(output))}"


def to_settings(flags: dict[str, Any], output: Path) -> dict[str, Any]:
    """The options of a run as JSON can hold them, for `resumed`."""
    kept = {name: value for name, value in {**flags, "output": output}.items() if name not in _NOT_KEPT}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def resumed(ctx: click.Context, flags: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that `--resume` names.

    Raises:
        XFactorError: there is no such run, it was begun by a version with other options, or more options are given.
    """
    from ..errors import XFactorError
    from ..runs.folder import interrupted_settings

    others = [name for name in flags if name != "resume" and given(ctx, name)]
    if others:
        flag = next(p.opts[0] for p in ctx.command.params if p.name == others[0])
        raise XFactorError(f"--resume takes every option from the run; drop {flag}")
    output = flags["resume"]
    kept = interrupted_settings(output)
    if kept.keys() != flags.keys() - set(_NOT_KEPT):
        raise XFactorError(f"--resume {output}: the run was begun by another version, or from Python; resume it there")
    paths = {name: Path(kept[name]) for name in _PATHS if kept[name] is not None}
    lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return {**kept, **paths, **lists, "output": output, "resume": output, "force": True}
