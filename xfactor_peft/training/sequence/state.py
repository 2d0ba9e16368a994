"""What the sequence-level phase consists of, for a checkpoint: see `training_state` for that of the loop."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch

from ...checkpoint.state import (
    check_finite,
    distinct_copies,
    history_tensor,
    keep_optimizer,
    keep_random,
    load_optimizer,
    load_random,
    steps_of,
)  # fmt: skip
from .planner import Planner, PlanStep

if TYPE_CHECKING:
    from ..loop import Step
    from ..rate_run import RateRun

_OPTIMIZERS = ("optimizer", "value_optimizer")


class PlanningState:
    """The policy's trained tensors, the learnt value, both optimisers, the controller of lambda, random numbers.

    Attributes:
        before: the policy's tensors as the phase began.
    """

    def __init__(self, planner: Planner, run: RateRun) -> None:
        self._planner, self._run = planner, run
        self.before = self.weights()

    @property
    def history(self) -> list[Step]:
        return self._run.history

    def _policy(self) -> dict[str, torch.Tensor]:
        planner = self._planner
        named: dict[str, torch.Tensor] = {}
        named |= {f"model/{name}": p for name, p in planner.split_model.model.named_parameters() if p.requires_grad}
        return named if planner.head is None else {**named, "offset": planner.head.offset}

    def _value(self) -> dict[str, torch.Tensor]:
        return {f"value/{name}": p for name, p in self._planner.value.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's tensors, for `put`."""
        return {name: p.detach().clone() for name, p in self._policy().items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the policy these tensors."""
        for name, parameter in self._policy().items():
            parameter.copy_(weights[name])
        if self._planner.head is not None:
            self._planner.head.write()

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        tensors, facts = {**self._policy(), **self._value()}, {"threads": torch.get_num_threads()}
        check_finite(tensors, len(self.history))
        for name in _OPTIMIZERS:
            keep_optimizer(name, getattr(self._planner, name), tensors, facts)
        tensors |= {"strengths": self._planner.strengths, "integral": self._planner.integral}
        tensors["plan"] = torch.tensor([astuple(step) for step in self._run.plan], dtype=torch.float64)
        tensors |= {f"before/{name}": value for name, value in self.before.items()}
        tensors["history"] = history_tensor(self.history)
        keep_random(tensors)
        return distinct_copies(tensors), facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Become the captured state."""
        planner = self._planner
        self.load_weights(tensors)
        with torch.no_grad():
            for name, parameter in self._value().items():
                parameter.copy_(tensors[name])
        for name in _OPTIMIZERS:
            load_optimizer(name, getattr(planner, name), tensors, facts)
        planner.strengths = tensors["strengths"].to(planner.strengths)
        planner.integral = tensors["integral"].to(planner.integral)
        self.before = {name: tensors[f"before/{name}"].to(value) for name, value in self.before.items()}
        self._run.history = steps_of(tensors)
        self._run.plan = [PlanStep(int(row[0]), *row[1:]) for row in tensors["plan"].tolist()]
        load_random(tensors)
