"""Job after job: a line for each with the time left, and in a terminal the step that the current one is at."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from rich.console import Console
from rich.markup import escape

from . import process
from .process import Job, Place
from .store import Record


class Session:
    """Runs jobs at a place.

    Args:
        waiting: the kinds of all jobs that are to come.
        known: (kind, seconds) of jobs that are done already, to guess the time left from.
    """

    def __init__(self, place: Place, waiting: Iterable[str], known: Iterable[tuple[str, float]] = ()) -> None:
        self.place, self._waiting, self._known = place, list(waiting), list(known)
        self._console = Console(highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def run(self, job: Job) -> Record:
        """Run a job and say what became of it."""
        with self._console.status(escape(job.label)) as status:

            def on_step(step: int, loss: float) -> None:
                status.update(escape(f"{job.label}: step {step} of {job.steps}, loss {loss:.4f}{self.left()}"))

            record = process.run(job, self.place, on_step)
        self.finished(job, record)
        return record

    @classmethod
    def run_missing(cls, jobs: Iterable[Job], place: Place, *, force: bool = False) -> None:
        """Run the jobs that have no record yet; with `force` all."""
        missing = [job for job in jobs if force or not (place.folder / job.file).exists()]
        session = cls(place, [job.kind for job in missing])
        for job in missing:
            session.run(job)

    def finished(self, job: Job, record: Record) -> None:
        if job.kind in self._waiting:
            self._waiting.remove(job.kind)
        if "wall" in record:
            self._known.append((job.kind, record["wall"]))
        self.say(f"{job.label}: {outcome(record)}{self.left()}")

    def left(self) -> str:
        """ ", about 1:05 left": the mean of those that are done, of the same kind if there are any."""
        if not (self._waiting and self._known):
            return ""
        every = [seconds for _, seconds in self._known]
        alike = ([seconds for known, seconds in self._known if known == kind] or every for kind in self._waiting)
        return f", about {clock(sum(map(mean, alike)))} left"


def outcome(record: Record) -> str:
    """A record in a few words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']}"
    words = [f"{record['wall']:.0f} s"]
    if "tried" in record:
        words.append(f"learning rate {record['lr']:g}")
    if losses := record.get("losses") or record.get("loss"):
        first, last = losses.values() if isinstance(losses, dict) else (losses[0], losses[-1])
        words.append(f"loss {first:.3f} → {last:.3f}")
    if scores := record.get("scores") or record.get("after"):
        words.append(f"R {scores['rate']:.4f}, KL {scores['kl_from_base']:.4f}")
    return ", ".join(words)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
