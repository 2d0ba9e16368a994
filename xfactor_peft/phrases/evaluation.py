"""Texts of a model on prompts, drawn with the settings of a run, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..options import ChatOptions, PhraseOptions, SamplingOptions
from ..tokens.automaton import TokenAutomaton
from .scores import PhraseScores, kl_from_base, score
from .texts import Texts, draw, encoded

BEFORE, AFTER = 101, 102
"""Numbers of the draws that are scored: other random numbers than those that are learnt from."""


def sampling_of(options: PhraseOptions, number: int) -> SamplingOptions:
    """How a run draws texts; `number` says which random numbers."""
    return SamplingOptions(options.length, seed=1009 * options.seed + number)


def draw_texts(
    base: Base,
    policy: SplitModel,
    automaton: TokenAutomaton,
    prompts: Sequence[str],
    count: int,
    sampling: SamplingOptions,
    chat: ChatOptions,
    **how: Any,
) -> Texts:
    """`count` texts, the prompts in turn; `how` is passed on to `texts.draw`."""
    ids = encoded(base, prompts, sampling.max_new_tokens, chat)
    return draw(base, policy, automaton, [ids[i % len(ids)] for i in range(count)], sampling, **how)


def evaluate_phrases(
    base: Base,
    policy: SplitModel,
    automaton: TokenAutomaton,
    prompts: Sequence[str],
    count: int,
    sampling: SamplingOptions,
    chat: ChatOptions,
    adapter_off: Callable[[], AbstractContextManager] | None = None,
) -> tuple[PhraseScores, Texts]:
    """Scores of `count` texts; without `adapter_off` the policy is the base."""
    texts = draw_texts(base, policy, automaton, prompts, count, sampling, chat)
    if adapter_off is not None:
        texts = replace(texts, kl=kl_from_base(policy, texts, adapter_off))
    return score(base.tokenizer, automaton, texts), texts
