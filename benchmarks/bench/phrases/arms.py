"""What else one could do about words and phrases, scored as an adapter is: on its own texts after held-out prompts.

exact              texts of the base without any of the patterns: the nearest distribution that never says them, and
                   slow, since most texts are thrown away. KL a token = -log P(text is kept) / length.
ban of completion  the token that would complete a pattern is not drawn; what led to it stays
ban of first       a logit bias of -100 on the tokens that a pattern can begin with
preference         LoRA on pairs (token that began a pattern, likeliest one that begins none), DPO on this one token
                   (Rafailov et al. 2023, arXiv:2305.18290; at first tokens as Paech 2025, arXiv:2510.15061)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import SplitModel
from xfactor_peft.lora.wrap import adapter_off, add_lora
from xfactor_peft.options import LoraOptions, SamplingOptions
from xfactor_peft.phrases.evaluation import Author
from xfactor_peft.phrases.scores import kl_from_base, score
from xfactor_peft.phrases.texts import Texts
from xfactor_peft.tokens.automaton import TokenAutomaton

from ..store import Record
from ..training.texts import held_out_windows, perplexity

BANNED = -100.0
WINDOWS = 40


class Arms:
    """What the arms share: a base, patterns, prompts, and `count` texts of `length` tokens to be scored by; `cache` is
    the MiB of those that are drawn at once."""

    def __init__(
        self,
        base: Base,
        automaton: TokenAutomaton,
        fit: Sequence[str],
        prompts: Sequence[str],
        count: int,
        length: int,
        cache: int = 512,
    ) -> None:
        self.base, self.automaton, self.fit, self.prompts = base, automaton, fit, prompts
        self.count, self.length = count, length
        self.author = Author(base, automaton, cache=cache)
        self.policy = self.author.policy

    def draw(self, number: int, count: int, prompts: Sequence[str] | None = None, **how: object) -> Texts:
        sampling = SamplingOptions(self.length, seed=50_000 + number)
        return self.author.write(prompts or self.prompts, count, sampling, **how)

    def scored(self, texts: Texts) -> Record:
        return {**score(self.base.tokenizer, self.automaton, texts).record(), "counts": None}

    def prose(self, policy: SplitModel) -> float:
        return perplexity(policy, held_out_windows(self.base.tokenizer, WINDOWS, 128))

    def exact(self, seed: int) -> Record:
        """By rejection: each prompt's texts until enough are kept."""
        repeats = -(-3 * self.count // len(self.prompts))
        texts = self.draw(seed, repeats * len(self.prompts))
        kept = texts.counts(self.automaton).sum(1) == 0
        by_prompt = kept.reshape(repeats, len(self.prompts)).sum(0)
        kl = float(-np.log((by_prompt + 0.5) / (repeats + 1)).mean() / self.length)
        chosen = torch.from_numpy(np.flatnonzero(kept)[: self.count])
        fields = ("ids", "hidden", "log_z", "kl")
        some = replace(texts, states=texts.states[chosen], **{name: getattr(texts, name)[chosen] for name in fields})
        return {**self.scored(some), "kl": kl, "kept": float(kept.mean()), "drawn": len(kept)}

    def ban_of_completion(self, seed: int) -> Record:
        return self.scored(self.draw(seed, self.count, tilt=_Completing(self.automaton)))

    def ban_of_first(self, seed: int) -> Record:
        return self.scored(self.draw(seed, self.count, tilt=_Constant(first_tokens(self.automaton))))

    def preference(self, seed: int, *, texts: int = 256, rank: int = 8, lr: float = 3e-5, beta: float = 0.1) -> Record:
        """Leaves the base changed: the last arm."""
        pairs = list(_pairs(self.policy, self.automaton, self.draw(seed, texts, self.fit)))
        torch.manual_seed(seed)
        model = add_lora(self.base.model, LoraOptions(r=rank, alpha=2 * rank, target="all"))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for _ in range(2):
            for at in torch.randperm(len(pairs)).split(8):
                loss = _preference(self.policy, [pairs[i] for i in at.tolist()], beta)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        drawn = self.draw(seed, self.count)
        drawn = replace(drawn, kl=kl_from_base(self.policy, drawn, partial(adapter_off, model)))
        return {**self.scored(drawn), "pairs": len(pairs), "prose": self.prose(self.policy)}


class _Completing:
    """No token that completes a pattern, whatever would follow (a `texts.Tilt`)."""

    def __init__(self, automaton: TokenAutomaton) -> None:
        self._automaton, self._known = automaton, {}

    def add_to(self, z: torch.Tensor, hidden: torch.Tensor, states: np.ndarray) -> None:
        for state in np.unique(states).tolist():
            if state not in self._known:
                self._known[state] = torch.from_numpy(np.flatnonzero(self._completing(state)))
            z[torch.from_numpy(np.flatnonzero(states == state))[:, None], self._known[state]] = BANNED

    def _completing(self, state: int) -> np.ndarray:
        """Which tokens complete a pattern from a state, (V,) bool."""
        row, whole = self._automaton.row(state), self._automaton.automaton.ending
        empty = np.zeros(self._automaton.vocab_size, dtype=bool)
        found = empty if row.reference is None else self._completing(row.reference)
        found[row.ids] = [bool(e or whole(int(s))) for e, s in zip(row.ended, row.following, strict=True)]
        return found


class _Constant:
    """A logit bias of -100 on some tokens (a `texts.Tilt`)."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = torch.from_numpy(tokens)

    def add_to(self, z: torch.Tensor, hidden: torch.Tensor, states: np.ndarray) -> None:
        z[:, self._tokens] += BANNED


def first_tokens(automaton: TokenAutomaton) -> np.ndarray:
    """The longest tokens that the patterns' usual spellings begin with, after a space and at a line's start."""
    whole, found = {raw: i for i, raw in automaton.bytes.items()}, set()
    for pattern in automaton.patterns:
        for text in (pattern.body, pattern.body[:1].upper() + pattern.body[1:]):
            for spelt in (f" {text}".encode(), text.encode()):
                found.add(next(whole[spelt[:n]] for n in range(len(spelt), 0, -1) if spelt[:n] in whole))
    return np.array(sorted(found))


def _pairs(policy: SplitModel, automaton: TokenAutomaton, texts: Texts):
    """(context, token that began an occurrence, likeliest token that begins none, log-odds under the base)."""
    inside = automaton.automaton.inside
    for n, ids in enumerate(texts.ids.tolist()):
        states, ended = automaton.run(ids, int(texts.states[n, 0]))
        for t, done in enumerate(ended):
            if not done:
                continue
            begin = t
            while begin and inside(states[begin]):
                begin -= 1
            log_p = policy.logits(texts.hidden[n, begin][None])[0].float().log_softmax(0)
            free = (i for i in log_p.topk(50).indices.tolist() if not inside(automaton.step(states[begin], i)[0]))
            chosen = next((i for i in free if i != ids[begin]), None)
            if chosen is not None:
                context = torch.tensor([*texts.prompts[n], *ids[:begin]])
                yield context, ids[begin], chosen, float(log_p[chosen] - log_p[ids[begin]])


def _preference(policy: SplitModel, pairs: list, beta: float) -> torch.Tensor:
    contexts, rejected, chosen, before = zip(*pairs, strict=True)
    hidden = policy.hidden(pad_sequence(list(contexts), batch_first=True))
    last = torch.stack([row[len(c) - 1] for row, c in zip(hidden, contexts, strict=True)])
    log_pi = policy.logits(last).float().log_softmax(1)
    rows = torch.arange(len(pairs))
    margin = log_pi[rows, list(chosen)] - log_pi[rows, list(rejected)] - torch.tensor(before)
    return -F.logsigmoid(beta * margin).mean()
