"""`train_phrases`: a base, patterns with wanted rates and prompts in; an adapter and its scores out.

1. The base writes texts; the automaton runs along, and counts what the base gives every token in every state.
2. It writes some more under an upward tilt, so that states inside of patterns are seen, too.
3. lambda is solved for the wanted rates from these counts.
4. The phrase head learns the teacher's weights at every position of these texts.
5. The student writes texts: they correct lambda where a rate above 0 is missed, and are learnt from as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..base.loading import Base
from ..base.split_model import split
from ..errors import XFactorError
from ..lora.wrap import add_lora
from ..lowmem.peft_parts import side_a, side_b
from ..options import ChatOptions, LoraOptions, PhraseOptions, SamplingOptions
from ..progress import phase
from ..tokens.automaton import TokenAutomaton
from .ban import BAN, Proof, ban
from .goals import PhraseTarget
from .head import PhraseHead, chosen_tokens, fit, joined, mean_kl, positions
from .scores import PhraseScores, decoded, risen, score
from .solving import Solved, per_pattern, solve
from .texts import Texts, draw, encoded
from .values import Statistics, Values

UPWARD = 3.0
"""The strength under which the second texts are drawn."""


@dataclass
class PhraseResult:
    """What came of it.

    Attributes:
        model: the base, wrapped by PEFT with the new adapter.
        tokens: how many the head has a row for; proof: of the bans, where characters or scripts are to come never.
        before, after: scores on the held-out prompts; None where none were asked for.
        rounds: one entry a round: loss, what is left to learn of it, rates of the student.
        samples: (prompt, text of the base, text of the student).
    """

    base: Base
    model: PeftModel
    target: PhraseTarget
    options: PhraseOptions
    solved: Solved
    tokens: int
    proof: Proof | None
    before: PhraseScores | None = None
    after: PhraseScores | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    risen: list[tuple[str, int, int]] = field(default_factory=list)
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lora(self) -> LoraOptions:
        """Of the adapter."""
        rank = max(1, self.options.r)
        return LoraOptions(r=rank, alpha=rank, target="head")


class _Run:
    """What the steps share."""

    def __init__(self, base: Base, target: PhraseTarget, options: PhraseOptions, prompts: list[list[int]]) -> None:
        self.base, self.target, self.options, self.prompts = base, target, options, prompts
        self.automaton = TokenAutomaton(base.tokenizer, target.patterns, base.vocab_size)
        self.policy = split(base.model)
        self.statistics = Statistics(self.automaton)
        self.texts: list[tuple[Texts, Values | None]] = []

    def draw(self, count: int, number: int, **how: Any) -> Texts:
        """`count` texts, the prompts in turn; `number` says which random numbers."""
        sampling = SamplingOptions(self.options.length, seed=1009 * self.options.seed + number)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return draw(self.base, self.policy, self.automaton, prompts, sampling, **how)

    def values(self, solved: Solved) -> Values:
        return Values(self.statistics, per_pattern(self.target, solved.strengths))

    def goal_rates(self, texts: Texts) -> np.ndarray:
        """Sampled rates of the goals per token, (G,)."""
        return texts.counts(self.automaton).sum(0) @ self.target.members / texts.ids.numel()

    def words_per_token(self) -> float:
        texts, _ = self.texts[0]
        return sum(len(text.split()) for text in decoded(self.base.tokenizer, texts)) / texts.ids.numel()

    def learn(self, head: PhraseHead | None, solved: Solved) -> tuple[PhraseHead, dict[str, Any]]:
        """The head, from its start for the first time, fitted to the teacher on all texts so far."""
        values = self.values(solved)
        if head is None:
            weight, bias = self.policy.weight, self.policy.bias
            head = PhraseHead(chosen_tokens(values), weight, bias, self.options.r)
            start = True
        else:
            start = False
        at = joined([positions(head, texts, values, drawn_by) for texts, drawn_by in self.texts])
        if start:
            head.start(at)
        left, whole = mean_kl(head, at)
        fit(head, at, epochs=self.options.epochs, lr=self.options.lr, seed=self.options.seed)
        after, _ = mean_kl(head, at)
        return head, {"kl_to_base": whole, "kl_before": left, "kl_after": after}


def train_phrases(
    base: Base,
    target: PhraseTarget,
    prompts: Sequence[str],
    held_out: Sequence[str] = (),
    options: PhraseOptions = PhraseOptions(),
    chat: ChatOptions = ChatOptions("auto"),
) -> PhraseResult:
    """Train an adapter for the target on texts that follow `prompts`; score it on those that follow `held_out`.

    Raises:
        XFactorError: no prompt, a pattern with a wanted rate above 0 that the base never says, or a prompt that with
            its text is longer than the model's context.
    """
    if not prompts:
        raise XFactorError("`prompts` holds no prompt")
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    hard = tuple(pattern for goal in target.goals if goal.hard for pattern in goal.patterns)
    proof = ban(base.tokenizer, hard, base.vocab_size) if hard else None
    run = _Run(base, target, options, encoded(base, prompts, options.length, chat))
    if all(goal.hard for goal in target.goals):  # nothing to learn, and so nothing to learn from
        rates = np.zeros(len(target.goals))
        head = PhraseHead(np.zeros(0, dtype=np.int64), run.policy.weight, run.policy.bias, 0)
        rounds: list[dict[str, Any]] = []
        solved = Solved(np.full(len(rates), -np.inf), rates, rates, rates)
    else:
        head, rounds, solved = _learnt(run)
    if proof:
        head.ban(proof.banned)
    result = PhraseResult(base, _write(base, head), target, options, solved, len(head.tokens), proof, rounds=rounds)
    if held_out and options.eval_texts:
        _score(result, run, head, held_out, chat)
    result.seconds = time.perf_counter() - started
    return result


def _learnt(run: _Run) -> tuple[PhraseHead, list[dict[str, Any]], Solved]:
    target, options = run.target, run.options
    with phase("drawing texts of the base"):
        run.texts.append((run.draw(options.texts, 1, statistics=run.statistics), None))
    with phase("drawing texts with more of the patterns"):
        run.statistics.only_inside = True
        upward = Values(run.statistics, np.full(len(target.patterns), UPWARD))
        run.texts.append((run.draw(max(1, options.texts // 4), 2, statistics=run.statistics, tilt=upward), upward))
    words_per_token = run.words_per_token()
    solved = solve(run.statistics, target, words_per_token)
    _check_reachable(target, solved)
    head: PhraseHead | None = None
    rounds: list[dict[str, Any]] = []
    correction = np.ones(len(target.goals))
    for number in range(options.rounds + 1):
        with phase(f"learning, round {number + 1}"):
            head, entry = run.learn(head, solved)
        rounds.append({**entry, "strengths": [float(s) for s in np.maximum(solved.strengths, -99)]})
        if number < options.rounds:
            with phase(f"drawing texts of the student, round {number + 1}"):
                own = run.draw(max(4, options.texts // 2), 3 + number, tilt=head)
            run.texts.append((own, run.values(solved)))
            rates = run.goal_rates(own)
            rounds[-1]["rates"] = rates.tolist()
            correction = correction * _correction(rates, solved, own.ids.numel())
            solved = solve(run.statistics, target, words_per_token, correction)
    assert head is not None  # there is a round
    return head, rounds, solved


def _check_reachable(target: PhraseTarget, solved: Solved) -> None:
    for goal, base, wanted in zip(target.goals, solved.base, solved.wanted, strict=True):
        if wanted > 0 and base <= 0:
            raise XFactorError(f"the base never says {goal.name} after these prompts, so no tilt reaches a rate of it")


def _correction(rates: np.ndarray, solved: Solved, tokens: int) -> np.ndarray:
    """wanted / sampled of every goal, drawn towards 1 where few occurrences were seen."""
    expected = solved.wanted * tokens
    return np.where(solved.wanted > 0, (expected + 10) / (rates * tokens + 10), 1.0)


def _score(result: PhraseResult, run: _Run, head: PhraseHead, held_out: Sequence[str], chat: ChatOptions) -> None:
    base, options = run.base, run.options
    run.prompts = encoded(base, held_out, options.length, chat)
    with phase("measuring the base"):
        before = run.draw(options.eval_texts, 101)
    with phase("measuring the adapter"):
        after = run.draw(options.eval_texts, 102, tilt=head)
    result.before, result.after = (score(base.tokenizer, run.automaton, texts) for texts in (before, after))
    first, second = decoded(base.tokenizer, before), decoded(base.tokenizer, after)
    result.risen = risen(first, second)
    result.samples = list(zip(held_out, first, second, strict=False))


def _write(base: Base, head: PhraseHead) -> PeftModel:
    """The head as LoRA on the output embedding."""
    rank = max(1, len(head.a))  # LoRA has no rank 0
    model = add_lora(base.model, LoraOptions(r=rank, alpha=rank, target="head"), sets=rank)
    layer = base.model.get_output_embeddings()
    a, b = side_a(layer, "default"), side_b(layer, "default")
    with torch.no_grad():
        for parameter in (a.weight, b.weight, b.bias):
            parameter.zero_()
        if len(head.a):
            a.weight.copy_(head.a)
            b.weight[head.tokens.to(b.weight.device)] = head.b.to(b.weight)
        b.bias[head.tokens.to(b.bias.device)] = head.offset.to(b.bias)
        b.bias[head.banned.to(b.bias.device)] = BAN
    return model
