"""When a run is saved, and how it resumes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ..errors import XFactorError
from .checkpoints import Checkpoint, Checkpoints
from .interruption import Interrupted, Interruption

SAVE_EVERY = 50
"""Steps between checkpoints unless others are asked for."""


class State(Protocol):
    """What a phase of a run can be made of again: `TrainingState`, `SequenceState`."""

    @property
    def history(self) -> list[Any]: ...

    def capture(self) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def restore(self, state: dict[str, Any], facts: dict[str, Any]) -> None: ...


class NoCheckpoints:
    """What a run tells of itself to be saved, and nobody saves it.

    Attributes:
        start: the checkpoint to begin with, if any.
        facts: what else is stored with every checkpoint.
        phase: of the run; a checkpoint is restored in the phase that it was made in.
    """

    def __init__(self) -> None:
        self.start: Checkpoint | None = None
        self.facts: dict[str, Any] = {}
        self.phase = "train"

    @property
    def start_phase(self) -> str | None:
        """The phase of the checkpoint that the run resumes from; None for a run from its first step."""
        return self.start.facts["phase"] if self.start else None

    def recorded(self, name: str, default: Any) -> Any:
        """A fact of the checkpoint that the run resumes from, else `default`; stored again either way."""
        self.facts[name] = self.start.facts.get(name, default) if self.start else default
        return self.facts[name]

    def restore(self, state: State) -> None:
        """Bring a fresh run to where the checkpoint was made, if that is in this phase."""
        if self.start is not None and self.start_phase == self.phase:
            state.restore(self.start.state(), self.start.facts)

    def deferred(self) -> AbstractContextManager[None]:
        """Inside, a signal waits for the end of the step."""
        return nullcontext()

    def save(self, made: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save after `made` steps."""

    def after_step(self, state: State, *, last: bool, every: int | None = None) -> None:
        """Save when it is time to."""

    def resume_hint(self) -> str:
        """What an error message can add about what was saved; empty when nothing was."""
        return ""


class Checkpointer(NoCheckpoints):
    """Saves the state of a run every `every` steps (0: only at its end and when it is stopped), and restores it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        every: int,
        interruption: Interruption,
        start: Checkpoint | None = None,
    ) -> None:
        super().__init__()
        if every < 0:
            raise XFactorError(f"`save_every` must be at least 0; got {every}")
        self.checkpoints, self.start = checkpoints, start
        self._every, self._interruption = every, interruption

    def deferred(self) -> AbstractContextManager[None]:
        return self._interruption.deferred()

    def save(self, made: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save after `made` steps; raises XFactorError when it cannot be written."""
        self.checkpoints.save(made, state, {**self.facts, **facts, "phase": self.phase})

    def after_step(self, state: State, *, last: bool, every: int | None = None) -> None:
        """Save when it is time to; a phase with longer steps has its own `every`.

        Raises:
            Interrupted: a signal has come; the state is saved and the message says how to resume.
            XFactorError: the checkpoint cannot be written, or holds weights that are not finite.
        """
        made, signal = len(state.history), self._interruption.requested
        if last or signal is not None or (self._every and made % (every or self._every) == 0):
            self.save(made, *state.capture())
        if signal is not None:
            raise Interrupted(f"stopped and saved after step {made}; resume with `resume=True`", signal)

    def resume_hint(self) -> str:
        if self.checkpoints.saved is None:
            return ""
        return f"; the last good checkpoint is of step {self.checkpoints.saved}, in {self.checkpoints.folder}"
