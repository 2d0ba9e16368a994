"""Everything that decides how training continues: weights, optimiser, random numbers, place in the data, history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import XFactorError


@dataclass(frozen=True)
class Step:
    """One optimisation step: mean KL (nats), mass on S, gradient norm, seconds."""

    step: int
    loss: float
    set_mass: float
    grad_norm: float
    seconds: float


class Stream:
    """Batches that are counted, so that another run can come to the same place."""

    def __init__(self, batches: Iterator[torch.Tensor]) -> None:
        self._batches = batches
        self.drawn = 0
        self._last: torch.Tensor | None = None

    def draw(self) -> torch.Tensor:
        self._last = next(self._batches)
        self.drawn += 1
        return self._last

    def digest(self) -> str | None:
        """SHA-256 of the batch drawn last, which tells a stream of other contexts from this one."""
        return None if self._last is None else hashlib.sha256(self._last.cpu().numpy().tobytes()).hexdigest()


@dataclass
class TrainingState:
    """What one run of `optimise` consists of.

    Attributes:
        trainable: the trained parameters by name, in the optimiser's order.
        rows: sequences that go through the model at once; None means a whole micro-batch.
    """

    trainable: dict[str, nn.Parameter]
    optimizer: Any
    inputs: Stream
    history: list[Step] = field(default_factory=list)
    rows: int | None = None

    def capture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        check_finite(self.trainable, len(self.history))
        state = {
            "model": {name: parameter.detach() for name, parameter in self.trainable.items()},
            "optimizer": self.optimizer.state_dict()["state"],
            "random": random_states(),
            "history": rows_of(self.history),
        }
        facts = {"drawn": self.inputs.drawn, "batch": self.inputs.digest(), "rows": self.rows}
        return state, {**facts, "threads": torch.get_num_threads()}

    def restore(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Become the captured state; contexts are drawn again first, while the model is still the untrained one.

        Raises:
            XFactorError: the run trains other parameters, or its contexts are no longer the same.
        """
        weights = state["model"]
        if {name: value.shape for name, value in weights.items()} != {n: p.shape for n, p in self.trainable.items()}:
            raise XFactorError("the checkpoint is of other weights than this run trains; start again with `force=True`")
        while self.inputs.drawn < facts["drawn"]:
            self.inputs.draw()
        if self.inputs.digest() != facts["batch"]:
            raise XFactorError("the contexts are not those that this run began with; start again with `force=True`")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])
        load_optimizer(self.optimizer, state["optimizer"])
        self.rows = facts["rows"]
        self.history += steps_of(state["history"])
        load_random(state["random"])


def check_finite(trainable: Mapping[str, torch.Tensor], made: int) -> None:
    """Raises XFactorError when a weight is not finite after `made` steps, so that nothing could continue from it."""
    for name, value in trainable.items():
        if not torch.isfinite(value).all():
            raise XFactorError(f"step {made - 1}: {name} is no longer finite; lower `lr`")


def load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """Give an optimiser its moments back; settings such as the learning rate stay its own."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states() -> dict[str, Any]:
    """The states of torch's generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def load_random(states: dict[str, Any]) -> None:
    """The inverse of `random_states`, on a machine with as many GPUs."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def rows_of(history: list[Step]) -> list[tuple[float, ...]]:
    """Steps as plain numbers, for a checkpoint."""
    return [astuple(step) for step in history]


def steps_of(rows: list[tuple[Any, ...]]) -> list[Step]:
    """The inverse of `rows_of`."""
    return [Step(*row) for row in rows]
