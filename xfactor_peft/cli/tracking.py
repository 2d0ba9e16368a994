"""The options of `xfactor train` that send its curves to trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import Command, apply_options

if TYPE_CHECKING:
    from ..runs.tracking import Tracking


def tracking_options(function: Command) -> Command:
    """--log-with, --log-dir."""
    return apply_options(
        [
            click.option("--log-with", "trackers", multiple=True, metavar="TRACKER",
                         help="tensorboard, wandb, mlflow or any other tracker that accelerate knows; repeatable."),
            click.option("--log-dir", type=click.Path(path_type=Path), default="runs", show_default=True,
                         help="Where trackers that write files write them."),
        ],
        function,
        "Trackers",
    )  # fmt: skip


@contextmanager
def tracking(flags: dict[str, Any], run: str, settings: dict[str, Any]) -> Iterator[Tracking]:
    """The trackers that the options ask for, closed at the end."""
    from ..runs.tracking import Tracking

    flat = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
    trackers = Tracking(flags["trackers"], run, flags["log_dir"], flat)
    try:
        yield trackers
    finally:
        trackers.finish()
