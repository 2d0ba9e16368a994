"""The live progress bar of a training run."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training.train import Step
from .console import console


class TrainingProgress:
    """Loss, mass on the set, step time and time left; on a pipe, one plain line every tenth of the run."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  mass {task.fields[mass]}  {task.fields[pace]} s/step  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=steps, loss="–", mass="–", pace="–")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: Step) -> None:
        loss, mass, pace = f"{step.loss:.4f}", f"{step.set_mass:.4f}", f"{step.seconds:.2f}"
        self._progress.update(self._task, advance=1, loss=loss, mass=mass, pace=pace)
        done = step.step + 1
        if not self._live and (done % max(1, self._steps // 10) == 0 or done == 1):
            console.print(f"step {done}/{self._steps}  loss {loss}  mass {mass}  {pace} s/step")
