"""Which arm, which step, how long still: a live display in a terminal, one line a run elsewhere."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .plan import Run


class Durations:
    """Guesses how long a run takes from those that are done: of its group on its model, else of any."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, run: Run, seconds: float) -> None:
        self._seconds[run.group, run.model].append(seconds)

    def guess(self, run: Run) -> float | None:
        known = self._seconds.get((run.group, run.model)) or [s for group in self._seconds.values() for s in group]
        return sum(known) / len(known) if known else None

    def left(self, waiting: list[Run], share_done: float = 0.0) -> float | None:
        """Seconds for all of `waiting`, of whose first run this share is done; None before anything is known."""
        guesses = [self.guess(run) for run in waiting]
        if None in guesses:
            return None
        return sum(guesses) - (guesses[0] * share_done if guesses else 0.0)


class Display:
    """Two bars: all runs with the time left, and the current run's steps with its loss."""

    def __init__(self, runs: list[Run], done: int, durations: Durations, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._waiting, self._durations = list(runs), durations
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=done + len(runs), completed=done, note="")
        self._one = self._progress.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, run: Run, event: dict[str, Any]) -> None:
        """A report of the worker: start or step."""
        steps = run.total_steps
        done = event.get("step", 0)
        left = self._durations.left(self._waiting, done / steps if steps else 0.0)
        self._progress.update(self._all, note="" if left is None else f"about {clock(left)} left")
        note = f"loss {event['loss']:.4f}" if "loss" in event else ""
        self._progress.update(
            self._one, description=run.label, total=steps or None, completed=done, note=note, visible=True
        )

    def finished(self, run: Run, record: dict[str, Any]) -> None:
        """A run is done, or failed; its line stays on the screen."""
        self._waiting = [other for other in self._waiting if other != run]
        if "wall" in record:
            self._durations.add(run, record["wall"])
        self._progress.advance(self._all)
        left = self._durations.left(self._waiting)
        until = f"  (about {clock(left)} left)" if left and not self._console.is_terminal else ""
        self.say(f"{run.label}: {outcome(record)}{until}")


def outcome(record: dict[str, Any]) -> str:
    """A run's result in a few words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']}"
    words = [f"{record['wall']:.0f} s"]
    if "tried" in record:
        words.append(f"learning rate {record['lr']:g}")
    if record.get("loss"):
        words.append(f"loss {record['loss'][0]:.3f} → {record['loss'][-1]:.3f}")
    if "scores" in record:
        words.append(f"R {record['scores']['rate']:.3f}")
    return ", ".join(words)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
