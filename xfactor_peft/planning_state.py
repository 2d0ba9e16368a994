"""What the sequence-level phase consists of, for a checkpoint: see `training_state` for that of the loop."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch

from .planning import Planner, PlanStep
from .training_state import (
    apart,
    check_finite,
    history_tensor,
    keep_optimizer,
    keep_random,
    load_optimizer,
    load_random,
    steps_of,
)  # fmt: skip

if TYPE_CHECKING:
    from .loop import Step
    from .rate_run import RateRun

_OPTIMIZERS = ("optimizer", "value_optimizer")


class PlanningState:
    """The policy's trained tensors, the learnt value, both optimisers, the controller of lambda, random numbers."""

    def __init__(self, planner: Planner, run: RateRun) -> None:
        self._planner, self._run = planner, run

    @property
    def history(self) -> list[Step]:
        return self._run.history

    def _parameters(self) -> dict[str, torch.Tensor]:
        planner = self._planner
        named: dict[str, torch.Tensor] = {}
        named |= {f"model/{name}": p for name, p in planner.halves.model.named_parameters() if p.requires_grad}
        named |= {f"value/{name}": p for name, p in planner.value.named_parameters()}
        return named if planner.head is None else {**named, "offset": planner.head.offset}

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        tensors, facts = dict(self._parameters()), {"threads": torch.get_num_threads()}
        check_finite(tensors, len(self.history))
        for name in _OPTIMIZERS:
            keep_optimizer(name, getattr(self._planner, name), tensors, facts)
        tensors |= {"strengths": self._planner.strengths, "integral": self._planner.integral}
        tensors["plan"] = torch.tensor([astuple(step) for step in self._run.plan], dtype=torch.float64)
        tensors["history"] = history_tensor(self.history)
        keep_random(tensors)
        return apart(tensors), facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Become the captured state."""
        planner = self._planner
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[name])
        for name in _OPTIMIZERS:
            load_optimizer(name, getattr(planner, name), tensors, facts)
        planner.strengths = tensors["strengths"].to(planner.strengths)
        planner.integral = tensors["integral"].to(planner.integral)
        if planner.head is not None:
            planner.head.write()
        self._run.history = steps_of(tensors)
        self._run.plan = [PlanStep(int(row[0]), *row[1:]) for row in tensors["plan"].tolist()]
        load_random(tensors)
