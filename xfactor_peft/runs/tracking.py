"""Training curves in TensorBoard, or any tracker that accelerate knows (`--log-with`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import XFactorError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from ..training.train import Step


class Tracking:
    """A hook for `on_step`: sends loss, set mass, gradient norm and seconds of every step to trackers.

    Trackers start with the first step, when accelerate knows which process it is; only the main one writes.

    Args:
        names: accelerate's names, e.g. "tensorboard", "wandb", "mlflow", or its `GeneralTracker` objects.
        run: the run's name.
        folder: where trackers that write files write them.
        settings: flat settings to store with the run.

    Raises:
        XFactorError: a tracker that accelerate does not know, or whose package is not installed.
    """

    def __init__(
        self, names: Sequence[str | GeneralTracker], run: str, folder: Path, settings: dict[str, Any] | None = None
    ) -> None:
        self._run, self._folder, self._settings = run, folder, settings or {}
        self._names = check_trackers(names)
        self._trackers: list[GeneralTracker] | None = None

    def __call__(self, step: Step) -> None:
        values = asdict(step)
        self.log({f"train/{name}": value for name, value in values.items() if name != "step"}, values["step"])

    def log(self, values: dict[str, float], step: int) -> None:
        """Send any values."""
        for tracker in self._started():
            tracker.log(values, step=step)

    def finish(self) -> None:
        for tracker in self._trackers or ():
            tracker.finish()

    def _started(self) -> list[GeneralTracker]:
        if self._trackers is None:
            self._trackers = [self._start(name) for name in self._names]
        return self._trackers

    def _start(self, name: str | GeneralTracker) -> GeneralTracker:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker: GeneralTracker
        if isinstance(name, str):
            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(self._run, str(self._folder)) if kind.requires_logging_directory else kind(self._run)
        else:
            tracker = name
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(self._settings)
        return tracker


def check_trackers(names: Sequence[str | GeneralTracker]) -> list[str | GeneralTracker]:
    """The names, when accelerate knows them and their packages are installed; raises XFactorError otherwise."""
    return [_checked(name) for name in names]


def _checked(name: str | GeneralTracker) -> str | GeneralTracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if not isinstance(name, str):
        return name
    if name not in LOGGER_TYPE_TO_CLASS:
        raise XFactorError(f"--log-with {name}: unknown tracker; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if name not in {str(getattr(found, "value", found)) for found in get_available_trackers()}:
        raise XFactorError(f"--log-with {name}: its package is not installed; pip install {name}")
    return name
