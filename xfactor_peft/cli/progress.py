"""The live progress of a training run."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..progress import listening
from ..training.train import Step
from .console import console


class TrainingProgress:
    """What a run is doing, and of its steps loss, mass on the set, step time and time left.

    On a pipe: a plain line for every phase, and one for every tenth of the steps.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self._phase = steps, ""
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=1.0, figures="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        self._listening = listening(self._hear)
        self._listening.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._listening.__exit__(*error)
        self._progress.stop()

    def update(self, step: Step) -> None:
        """A step was made."""
        done, total = step.step + 1, self._steps
        figures = f"loss {step.loss:.4f}  mass {step.set_mass:.4f}  {step.seconds:.2f} s/step"
        self._show(f"step {done}/{total}", done / total, figures, restart=done == 1)
        if not self._live and (done % max(1, total // 10) == 0 or done == 1):
            console.print(f"step {done}/{total}  {figures}")

    def _hear(self, name: str, done: float, total: int) -> None:
        if not self._live and name != self._phase:
            console.print(name)
        counted = f"{name} {int(done)}/{total}" if total else name
        self._show(counted, done / total if total else 0.0, "", restart=name != self._phase)
        self._phase = name

    def _show(self, what: str, done: float, figures: str, *, restart: bool) -> None:
        if restart:
            self._progress.reset(self._task, total=1.0)
        self._progress.update(self._task, description=what, completed=done, figures=figures)
