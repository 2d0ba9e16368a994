"""Training curves in TensorBoard, or any other tracker that accelerate knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import XFactorError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from ..checkpoint.state import Step


class Tracking:
    """A hook for `on_step`: sends loss, set mass, gradient norm and seconds of every step to trackers.

    Trackers start with the first step, when accelerate knows which process it is; only the main one writes.

    Args:
        trackers: accelerate's names, e.g. "tensorboard", "wandb", "mlflow", or its `GeneralTracker` objects.
        run: the run's name.
        folder: where trackers that write files write them.
        settings: flat settings to store with the run.

    Raises:
        XFactorError: a tracker that accelerate does not know, or whose package is not installed.
    """

    def __init__(
        self, trackers: Sequence[str | GeneralTracker], run: str, folder: Path, settings: dict[str, Any] | None = None
    ) -> None:
        check_trackers(trackers)
        self._trackers, self._run, self._folder, self._settings = list(trackers), run, folder, settings or {}
        self._accelerator: Accelerator | None = None

    def __call__(self, step: Step) -> None:
        values = asdict(step)
        self.log({f"train/{name}": value for name, value in values.items() if name != "step"}, values["step"])

    def log(self, values: dict[str, float], step: int) -> None:
        """Send any values."""
        if not self._trackers:
            return
        if self._accelerator is None:
            from accelerate import Accelerator

            self._accelerator = Accelerator(log_with=self._trackers, project_dir=self._folder)
            self._accelerator.init_trackers(self._run, self._settings)
        self._accelerator.log(values, step=step)

    def finish(self) -> None:
        for tracker in self._accelerator.trackers if self._accelerator else ():
            tracker.finish()


def check_trackers(trackers: Sequence[str | GeneralTracker]) -> None:
    """Raises XFactorError for a tracker that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    for name in trackers:
        try:
            found = filter_trackers([name], logging_dir=".")
        except ValueError as error:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise XFactorError(f"`trackers={name}`: unknown tracker; accelerate knows {known}") from error
        if not found:
            raise XFactorError(f"`trackers={name}`: its package is not installed; pip install {name}")
