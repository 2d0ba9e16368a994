"""What the sequence-level phase consists of, for a checkpoint: see `checkpoint.state` for that of the loop."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from ...checkpoint.state import (
    Step,
    check_finite,
    load_optimizer,
    load_random,
    random_states,
    rows_of,
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
        named |= {name: p for name, p in trainer.split_model.model.named_parameters() if p.requires_grad}
        return named if trainer.head is None else {**named, "offset": trainer.head.offset}

    def _value(self) -> dict[str, torch.Tensor]:
        return dict(self._trainer.value.named_parameters())

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

    def capture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, facts), from which `restore` makes the same state again.

        Raises:
            XFactorError: a weight is not finite.
        """
        trainer = self._trainer
        check_finite({**self._policy(), **self._value()}, len(self.history))
        state = {
            "policy": self.weights(),
            "value": {name: parameter.detach() for name, parameter in self._value().items()},
            "optimizers": {name: getattr(trainer, name).state_dict()["state"] for name in _OPTIMIZERS},
            "strengths": trainer.controller.strengths,
            "integral": trainer.controller.integral,
            "sequence": [astuple(step) for step in self._steps],
            "before": self.before,
            "random": random_states(),
            "history": rows_of(self.history),
        }
        return state, {"threads": torch.get_num_threads()}

    def restore(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Become the captured state."""
        trainer = self._trainer
        self.load_weights(state["policy"])
        with torch.no_grad():
            for name, parameter in self._value().items():
                parameter.copy_(state["value"][name])
        for name in _OPTIMIZERS:
            load_optimizer(getattr(trainer, name), state["optimizers"][name])
        trainer.controller.strengths = state["strengths"].to(trainer.rates)
        trainer.controller.integral = state["integral"].to(trainer.rates)
        self.before = {name: state["before"][name].to(value) for name, value in self.before.items()}
        self.history[:] = steps_of(state["history"])
        self._steps[:] = [SequenceStep(*row) for row in state["sequence"]]
        load_random(state["random"])
