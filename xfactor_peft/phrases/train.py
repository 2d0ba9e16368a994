"""`train_phrases`: a base, patterns with wanted rates and prompts in; an adapter and its scores out.

1. The base writes texts; the automaton runs along, and counts what the base gives every token in every state. Tilted
   upward it writes others, which hold as much of a rare pattern as of a frequent one.
2. lambda is solved for the wanted rates from these counts.
3. The phrase head learns the teacher's weights at every position of these texts, then the last blocks what is left.
4. The student writes texts: they correct lambda where a rate above 0 is missed, and are learnt from as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..base.loading import Base
from ..errors import XFactorError
from ..lora.wrap import adapter_off
from ..lowmem.allocator import give_back_pages
from ..lowmem.peft_parts import side_a, side_b
from ..options import ChatOptions, PhraseOptions
from ..progress import phase
from ..tokens.automaton import TokenAutomaton
from .ban import BAN, Proof, ban
from .evaluation import AFTER, BEFORE, Author, sampling_of
from .goals import PhraseTarget
from .head import PhraseHead, Positions, chosen_tokens, fit, joined, mean_kl, positions
from .scores import PhraseScores, decoded, risen, words_of
from .solving import Solved, enriching, per_pattern, solve
from .texts import Texts
from .trunk import Lesson, base_states, train_trunk, upper_blocks, wrap
from .upper import UpperBlocks
from .values import Statistics, Values


@dataclass
class PhraseResult:
    """What came of it.

    Attributes:
        model: the base, wrapped by PEFT with the new adapter.
        tokens: how many the head has a row for; proof: of the bans, where characters or scripts are to come never.
        before, after: scores on the held-out prompts; None where none were asked for.
        rounds: one entry a round: the teacher's KL from the base, the student's KL from the teacher, rates.
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


class _Run:
    """What the steps share.

    Attributes:
        lessons: texts to learn from: the base's own, enriched ones, those of the last student.
        head, model, upper: the student's, once there are.
    """

    head: PhraseHead
    model: PeftModel
    upper: UpperBlocks

    def __init__(
        self, base: Base, target: PhraseTarget, prompts: Sequence[str], options: PhraseOptions, chat: ChatOptions
    ) -> None:
        self.base, self.target, self.prompts, self.options = base, target, prompts, options
        self.automaton = TokenAutomaton(base.tokenizer, target.patterns, base.vocab_size)
        self.author = Author(base, self.automaton, chat, options.cache)
        self.policy = self.author.policy
        self.statistics = Statistics(self.automaton)
        self.lessons: list[Lesson] = []

    def draw(self, count: int, number: int, **how: Any) -> Texts:
        """Texts that follow the prompts to learn from (see `Author.write`)."""
        return self.author.write(self.prompts, count, sampling_of(self.options, number), **how)

    def evaluate(self, prompts: Sequence[str], *, adapted: bool) -> tuple[PhraseScores, list[str]]:
        """Scores, and the texts that were scored."""
        off = partial(adapter_off, self.model) if adapted else None
        sampling = sampling_of(self.options, AFTER if adapted else BEFORE)
        return self.author.scored(prompts, self.options.eval_texts, sampling, off)

    def values(self, solved: Solved) -> Values:
        return Values(self.statistics, per_pattern(self.target, solved.strengths))

    def goal_rates(self, texts: Texts) -> np.ndarray:
        """Sampled rates of the goals per token, (G,)."""
        return texts.counts(self.automaton).sum(0) @ self.target.members / texts.ids.numel()

    def begin(self, values: Values) -> None:
        """A student that is the base."""
        self.head = PhraseHead(chosen_tokens(values), self.policy.weight, self.policy.bias, self.options.r)
        self.model = wrap(self.base, self.options, max(1, self.options.r))  # LoRA has no rank 0
        self.upper = upper_blocks(self.policy)

    def learn(self, values: Values, *, first: bool) -> dict[str, Any]:
        """The student fitted to the teacher on all texts so far: the head at first, then the last blocks."""
        parts = [positions(self.head, self.policy, lesson.texts, values) for lesson in self.lessons]
        entry: dict[str, Any] = {}
        if first or not self.options.trunk_r:
            entry |= self._fit(joined([part for part, _ in parts]), start=first)
        if self.options.trunk_r:
            lessons = [lesson.taught(*part) for lesson, part in zip(self.lessons, parts, strict=True)]
            entry["trunk"] = train_trunk(self.model, self.policy, self.head, lessons, self.options)
        return entry

    def _fit(self, at: Positions, *, start: bool) -> dict[str, Any]:
        if start:
            self.head.start(at)
        fit(self.head, at, epochs=self.options.epochs, lr=self.options.lr, seed=self.options.seed)
        return dict(zip(("kl_from_teacher", "kl_of_teacher"), mean_kl(self.head, at), strict=True))

    def student_lesson(self, number: int) -> tuple[Lesson, np.ndarray]:
        """Texts of the student, to be learnt from as well, with the base's states; and their goals' rates."""
        write_head(self.base, self.head)
        lesson = Lesson(self.draw(max(4, self.options.texts // 2), number), self.upper)
        base_states(self.policy, self.model, lesson)
        return lesson, self.goal_rates(lesson.texts)


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
    learns = not all(goal.hard for goal in target.goals)  # a ban alone has nothing to learn, and nothing to learn from
    if not learns:
        options = replace(options, r=0, trunk_r=0)
    run = _Run(base, target, prompts, options, chat)
    measured = bool(held_out and options.eval_texts)
    if measured:
        with phase("measuring the base"):
            before, old = run.evaluate(held_out, adapted=False)
    if learns:
        rounds, solved = _learnt(run)
    else:
        none = np.zeros(len(target.goals))
        rounds, solved = [], Solved(np.full(len(none), -np.inf), none, none, none)
        run.head = PhraseHead(np.zeros(0, dtype=np.int64), run.policy.weight, run.policy.bias, 0)
        run.model = wrap(base, options, 1)
    if proof:
        run.head.ban(proof.banned)
    write_head(base, run.head)
    result = PhraseResult(base, run.model, target, options, solved, len(run.head.tokens), proof, rounds=rounds)
    if measured:
        with phase("measuring the adapter"):
            after, new = run.evaluate(held_out, adapted=True)
        result.before, result.after = before, after
        result.risen, result.samples = risen(old, new), list(zip(held_out, old, new, strict=False))
    result.seconds = time.perf_counter() - started
    return result


def _learnt(run: _Run) -> tuple[list[dict[str, Any]], Solved]:
    target, options = run.target, run.options
    with phase("drawing texts of the base"):
        texts = run.draw(options.texts, 1, statistics=run.statistics)
    words = sum(len(words_of(text)) for text in decoded(run.base.tokenizer, texts)) / texts.ids.numel()
    with phase("drawing texts that hold more of the patterns"):
        more = Values(run.statistics, enriching(run.statistics, target))
        rich = run.draw(max(4, options.texts // 2), 2, statistics=run.statistics, tilt=more)
    solved = solve(run.statistics, target, words)
    _check_reachable(target, solved)
    values = run.values(solved)
    run.begin(values)
    run.lessons += [Lesson(drawn, run.upper) for drawn in (texts, rich)]
    rounds: list[dict[str, Any]] = []
    correction = np.ones(len(target.goals))
    for number in range(options.rounds + 1):
        give_back_pages()
        with phase(f"learning, round {number + 1}"):
            entry = run.learn(values, first=number == 0)
        rounds.append({**entry, "strengths": [float(s) for s in np.maximum(solved.strengths, -99)]})
        give_back_pages()
        if number < options.rounds:
            with phase(f"drawing texts of the student, round {number + 1}"):
                own, rates = run.student_lesson(3 + number)
            run.lessons = [*run.lessons[:2], own]  # those of an earlier student say less
            rounds[-1]["rates"] = rates.tolist()
            correction = correction * _correction(rates, solved, own.texts.ids.numel())
            solved = solve(run.statistics, target, words, correction)
            before, values = values, run.values(solved)
            run.head.follow(before, values)
    return rounds, solved


def _check_reachable(target: PhraseTarget, solved: Solved) -> None:
    for goal, base, wanted in zip(target.goals, solved.base, solved.wanted, strict=True):
        if wanted > 0 and base <= 0:
            raise XFactorError(f"the base never says {goal.name} after these prompts, so no tilt reaches a rate of it")


def _correction(rates: np.ndarray, solved: Solved, tokens: int) -> np.ndarray:
    """wanted / sampled of every goal, drawn towards 1 where few occurrences were seen."""
    expected = solved.wanted * tokens
    return np.where(solved.wanted > 0, (expected + 10) / (rates * tokens + 10), 1.0)


def write_head(base: Base, head: PhraseHead) -> None:
    """The head as LoRA on the output embedding."""
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
