"""Texts that are drawn with the automaton beside them: what they hold, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..base.split_model import SplitModel
from ..tokens.automaton import TokenAutomaton
from .values import Statistics


@dataclass
class Texts:
    """N texts of L tokens of a model's own after their prompts.

    Attributes:
        prompts: ids of each prompt.
        ids: (N, L), what was drawn; states: (N, L), the automaton's state before each.
        hidden: (N, L, D), what the output embedding made the tokens' logits of.
        log_z: (N, L), log of the sum of exp(logits), before any tilt, over the tokens that could be drawn.
        kl: (N, L), KL of what was drawn from to the same before its tilt: to the base, where the trunk is its.
    """

    prompts: list[list[int]]
    ids: torch.Tensor
    states: np.ndarray
    hidden: torch.Tensor
    log_z: torch.Tensor
    kl: torch.Tensor

    def whole(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Ids of some of the texts, with their prompts."""
        return [torch.cat([torch.tensor(self.prompts[row]), self.ids[row]]) for row in rows]

    def predicting(self, states: torch.Tensor, ids: list[torch.Tensor]) -> torch.Tensor:
        """Of states (n, W, D) of a forward pass over `whole` texts, those that predict the drawn tokens, (n L, D)."""
        length = self.ids.shape[1]
        return torch.cat([row[len(one) - length - 1 : len(one) - 1] for row, one in zip(states, ids, strict=True)])

    def counts(self, automaton: TokenAutomaton) -> np.ndarray:
        """Occurrences of every pattern in every text, (N, K)."""
        rows = zip(self.ids.tolist(), self.states[:, 0].tolist(), strict=True)
        return np.stack([automaton.counts(row, state) for row, state in rows])


class Tilt(Protocol):
    """What is added to the logits of a model's texts."""

    def add_to(self, z: torch.Tensor, hidden: torch.Tensor, states: np.ndarray) -> None:
        """In place; z (n, V) of states (n, D), the automaton being in these states (n,)."""


class Reader:
    """Runs the automaton along texts while they are drawn (a `sampler.Watcher`), and may tilt them."""

    def __init__(
        self,
        automaton: TokenAutomaton,
        prompts: list[list[int]],
        length: int,
        *,
        statistics: Statistics | None = None,
        tilt: Tilt | None = None,
    ) -> None:
        self.prompts, self._automaton, self._statistics, self._tilt = prompts, automaton, statistics, tilt
        self._made = np.zeros(len(prompts), dtype=np.int64)
        self._state = np.array([automaton.run(prompt)[0][-1] for prompt in prompts])
        shape = (len(prompts), length)
        self.ids = torch.zeros(shape, dtype=torch.long)
        self.log_z, self.kl = torch.zeros(shape), torch.zeros(shape)
        self.states = np.zeros(shape, dtype=np.int64)
        self.hidden: torch.Tensor | None = None

    def texts(self) -> Texts:
        """What was drawn; there is a token at least."""
        assert self.hidden is not None
        return Texts(self.prompts, self.ids, self.states, self.hidden, self.log_z, self.kl)

    def logits(self, texts: torch.Tensor, z: torch.Tensor, states: torch.Tensor) -> None:
        rows = texts.numpy()
        at = rows, self._made[rows]
        if self.hidden is None:
            self.hidden = torch.zeros(*self.ids.shape, states.shape[1], dtype=states.dtype)
        where, log_z = (texts, torch.from_numpy(at[1])), z.logsumexp(1)
        self.hidden[where], self.log_z[where] = states.cpu(), log_z.cpu()
        self.states[at] = self._state[rows]
        if self._statistics is not None:
            self._statistics.add(self._state[rows], (z - log_z[:, None]).exp_(), tilted=self._tilt is not None)
        if self._tilt is not None:
            log_p = z - log_z[:, None]
            self._tilt.add_to(z, states, self._state[rows])
            log_q = z.log_softmax(1)
            self.kl[where] = (log_q.exp() * (log_q - log_p).nan_to_num_()).sum(1).cpu()  # banned: -inf less -inf

    def drawn(self, texts: torch.Tensor, ids: torch.Tensor) -> None:
        for text, i in zip(texts.tolist(), ids.tolist(), strict=True):
            self.ids[text, self._made[text]] = i
            self._state[text] = self._automaton.step(int(self._state[text]), i)[0]
            self._made[text] += 1


def states_of(policy: SplitModel, texts: Texts, rows: torch.Tensor) -> torch.Tensor:
    """The model's states that predict the drawn tokens of some of the texts, (n L, D)."""
    ids = texts.whole(rows.tolist())
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # on the right: nothing before it sees it
    return texts.predicting(policy.hidden(padded.to(policy.weight.device)), ids)
