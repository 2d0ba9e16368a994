"""Texts of a model on prompts, drawn with the settings of a run, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from ..base.loading import Base
from ..base.split_model import split
from ..options import ChatOptions, PhraseOptions, SamplingOptions
from ..sampling.generation import encode_prompt
from ..sampling.sampler import cache_limit, sample
from ..tokens.automaton import TokenAutomaton
from ..tokens.ends import special_ids
from .scores import PhraseScores, decoded, kl_from_base, score
from .texts import Reader, Texts, Tilt
from .values import Statistics

BEFORE, AFTER = 101, 102
"""Numbers of the draws that are scored: other random numbers than those that are learnt from."""


def sampling_of(options: PhraseOptions, number: int) -> SamplingOptions:
    """How a run draws texts; `number` says which random numbers."""
    return SamplingOptions(options.length, seed=1009 * options.seed + number)


class Author:
    """A base, as it is or wrapped, that writes texts after prompts with an automaton beside it.

    Args:
        chat: whether prompts go through the chat template.
        cache: MiB of the texts that are drawn at once (see `PhraseOptions`).
    """

    def __init__(
        self, base: Base, automaton: TokenAutomaton, chat: ChatOptions = ChatOptions("auto"), cache: int = 128
    ) -> None:
        self.base, self.automaton, self.chat, self.policy = base, automaton, chat, split(base.model)
        self.cache = cache * 2**20

    def encoded(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of prompts that so many tokens are to follow."""
        return [encode_prompt(self.base.tokenizer, self.base.model, prompt, length, self.chat) for prompt in prompts]

    def write(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: SamplingOptions,
        *,
        statistics: Statistics | None = None,
        tilt: Tilt | None = None,
    ) -> Texts:
        """`count` texts of `sampling.max_new_tokens`, after the prompts in turn.

        Args:
            statistics: told what the model gives every token, before any tilt.
            tilt: the texts are drawn from the model so tilted.
        """
        length = sampling.max_new_tokens
        ids = self.encoded(prompts, length)
        begun = [ids[i % len(ids)] for i in range(count)]
        reader = Reader(self.automaton, begun, length, statistics=statistics, tilt=tilt)
        banned = sorted(special_ids(self.base.tokenizer, self.base.model))
        with cache_limit(lambda: self.cache, self.cache):
            for _ in sample(self.policy, begun, sampling, banned, watcher=reader):
                pass
        return reader.texts()

    def scored(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: SamplingOptions,
        adapter_off: Callable[[], AbstractContextManager] | None = None,
    ) -> tuple[PhraseScores, list[str]]:
        """Scores of `count` texts, and the texts; without `adapter_off` the model is the base."""
        texts = self.write(prompts, count, sampling)
        if adapter_off is not None:
            texts = replace(texts, kl=kl_from_base(self.policy, texts, adapter_off))
        tokenizer = self.base.tokenizer
        return score(tokenizer, self.automaton, texts), decoded(tokenizer, texts)
