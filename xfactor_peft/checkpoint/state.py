"""Everything that decides how training goes on: weights, optimiser, random numbers, place in the data, history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import XFactorError

_HISTORY, _OPTIMIZER = "history", "optimizer"


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

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        check_finite(self.trainable, len(self.history))
        tensors = {f"model/{name}": p.detach() for name, p in self.trainable.items()}
        facts: dict[str, Any] = {"drawn": self.inputs.drawn, "batch": self.inputs.digest(), "rows": self.rows}
        keep_optimizer(_OPTIMIZER, self.optimizer, tensors, facts)
        tensors[_HISTORY] = history_tensor(self.history)
        keep_random(tensors)
        facts["threads"] = torch.get_num_threads()
        return distinct_copies(tensors), facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Become the captured state; contexts are drawn again first, while the model is still the untrained one.

        Raises:
            XFactorError: the run trains other parameters, or its contexts are no longer the same.
        """
        kept = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
        shapes = {name: tuple(p.shape) for name, p in self.trainable.items()}
        if kept != shapes.keys() or any(tuple(tensors[f"model/{n}"].shape) != s for n, s in shapes.items()):
            raise XFactorError("the checkpoint is of other weights than this run trains; start again with `force=True`")
        while self.inputs.drawn < facts["drawn"]:
            self.inputs.draw()
        if self.inputs.digest() != facts["batch"]:
            raise XFactorError("the contexts are not those that this run began with; start again with `force=True`")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model/{name}"])
        load_optimizer(_OPTIMIZER, self.optimizer, tensors, facts)
        self.rows = facts["rows"]
        self.history += steps_of(tensors)
        load_random(tensors)


def check_finite(trainable: Mapping[str, torch.Tensor], made: int) -> None:
    """Raises XFactorError when a weight is not finite after `made` steps, so that nothing could go on from here."""
    for name, value in trainable.items():
        if not torch.isfinite(value).all():
            raise XFactorError(f"step {made - 1}: {name.removeprefix('model/')} is no longer finite; lower `lr`")


def keep_optimizer(name: str, optimizer: Any, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Put an optimiser's state into `tensors` and `facts` under `name`."""
    facts[name] = {}
    _flatten(optimizer.state_dict()["state"], name, tensors, facts[name])


def load_optimizer(name: str, optimizer: Any, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """The inverse of `keep_optimizer`; settings such as the learning rate stay the optimiser's own."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": _unflatten(name, tensors, facts[name]), "param_groups": groups})


def keep_random(tensors: dict[str, torch.Tensor]) -> None:
    """Put the states of torch's generators into `tensors`."""
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}


def load_random(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random/cuda")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def history_tensor(history: list[Step]) -> torch.Tensor:
    return torch.tensor([astuple(step) for step in history], dtype=torch.float64)


def steps_of(tensors: dict[str, torch.Tensor]) -> list[Step]:
    """The history in a checkpoint's tensors."""
    return [Step(int(row[0]), *row[1:]) for row in tensors[_HISTORY].tolist()]


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """Tensors of nested dictionaries by path, everything else into `plain`; integer keys are marked by #."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
    elif isinstance(value, dict):
        for key, part in value.items():
            _flatten(part, f"{path}/#{key}" if isinstance(key, int) else f"{path}/{key}", tensors, plain)
    else:
        plain[path] = value


def _unflatten(root: str, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[Any, Any]:
    found = {path: value for path, value in tensors.items() if path.startswith(f"{root}/")} | plain
    tree: dict[Any, Any] = {}
    for path, value in found.items():
        *parents, last = [int(key[1:]) if key.startswith("#") else key for key in path.split("/")[1:]]
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return tree


def distinct_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous on the CPU, and no two in the same memory, as files of safetensors want them."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        result[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
    return result
