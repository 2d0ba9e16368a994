"""What the sequence-level phase consists of, for a checkpoint: see `checkpoint.state` for that of the loop."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from ...checkpoint.state import (
    Step,
    check_finite,
    distinct_copies,
    history_tensor,
    keep_optimizer,
    keep_random,
    load_optimizer,
    load_random,
    steps_of,
)  # fmt: skip
from .trainer import SequenceStep, SequenceTrainer

_OPTIMIZERS = ("optimizer", "value_optimizer")


class SequenceState:
    """The policy's trained tensors, the learnt value, both optimisers, the controller of lambda, random numbers.

    Attributes:
        before: the policy's tensors as the phase began.
        history: every step of the run, those of this phase included.
    """

    def __init__(self, trainer: SequenceTrainer, history: list[Step], made: list[SequenceStep]) -> None:
        self._trainer, self.history, self._steps = trainer, history, made
        self.before = self.weights()

    def _policy(self) -> dict[str, torch.Tensor]:
        trainer = self._trainer
        named: dict[str, torch.Tensor] = {}
        named |= {f"model/{name}": p for name, p in trainer.split_model.model.named_parameters() if p.requires_grad}
        return named if trainer.head is None else {**named, "offset": trainer.head.offset}

    def _value(self) -> dict[str, torch.Tensor]:
        return {f"value/{name}": p for name, p in self._trainer.value.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's tensors, for `load_weights`."""
        return {name: p.detach().clone() for name, p in self._policy().items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the policy these tensors."""
        for name, parameter in self._policy().items():
            parameter.copy_(weights[name])
        if self._trainer.head is not None:
            self._trainer.head.write()

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        tensors, facts = {**self._policy(), **self._value()}, {"threads": torch.get_num_threads()}
        check_finite(tensors, len(self.history))
        for name in _OPTIMIZERS:
            keep_optimizer(name, getattr(self._trainer, name), tensors, facts)
        tensors |= {"strengths": self._trainer.controller.strengths, "integral": self._trainer.controller.integral}
        tensors["sequence"] = torch.tensor([astuple(step) for step in self._steps], dtype=torch.float64)
        tensors |= {f"before/{name}": value for name, value in self.before.items()}
        tensors["history"] = history_tensor(self.history)
        keep_random(tensors)
        return distinct_copies(tensors), facts

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Become the captured state."""
        trainer = self._trainer
        self.load_weights(tensors)
        with torch.no_grad():
            for name, parameter in self._value().items():
                parameter.copy_(tensors[name])
        for name in _OPTIMIZERS:
            load_optimizer(name, getattr(trainer, name), tensors, facts)
        trainer.controller.strengths = tensors["strengths"].to(trainer.rates)
        trainer.controller.integral = tensors["integral"].to(trainer.rates)
        self.before = {name: tensors[f"before/{name}"].to(value) for name, value in self.before.items()}
        self.history[:] = steps_of(tensors)
        self._steps[:] = [SequenceStep(int(row[0]), *row[1:]) for row in tensors["sequence"].tolist()]
        load_random(tensors)
