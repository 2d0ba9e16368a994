"""What `xfactor train` prints before and after the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.loading import Base
from ..base.quantised import numbers
from ..lora.wrap import matched_modules, unmatched_modules
from ..lowmem.linears import listed
from ..objective.targets import Target, TiltedTarget
from ..options import Recipe
from ..sampling.frontier import Frontier
from ..sampling.metrics import Evaluation
from ..tokens.printable import counted
from ..tokens.rule import Rule
from ..training.rate_head import HeadReport
from ..training.rate_report import RateReport
from ..training.train import TrainResult
from .console import console, print_columns
from .plan_text import print_measured

MOST_PRICE = 1.15
"""Of the KL of one constant; above it the other choice is named."""


def print_start(base: Base, target: Target, recipe: Recipe) -> None:
    """The token sets, the matched layers and the recipe."""
    options, lora = recipe.train, recipe.lora
    sets = [goal.tokens for goal in target.goals] or [target.tokens]
    if not target.goals:
        tokens = target.tokens
        console.print(f"tokens: {tokens.describe()}, {len(tokens)} of {tokens.vocab_size}")
    for goal in target.goals:
        wanted = f"rate {goal.rate:g}" if goal.rate is not None else f"lambda {goal.strength:g}"
        size = f"{len(goal.tokens)} of {goal.tokens.vocab_size}"
        console.print(f"tokens: {goal.tokens.describe()}, {size}; wanted {wanted}")
    if left_out := [word for tokens in sets for word in tokens.without_token]:
        console.print(f"left out, for the vocabulary has no token for it: {', '.join(left_out)}", markup=False)
    if options.method == "lora" and lora is not None:
        matched = matched_modules(base.model, lora.target)
        if lora.head:
            *_, head = matched
            del matched[head]
            console.print(f"set head: rank {len(target.goals)} on {head}")
        if matched:
            layers = listed(matched)
            console.print(f"lora: r {lora.r}, alpha {lora.alpha}, on {sum(matched.values())} layers ({layers})")
        if unmatched := unmatched_modules(base.model, lora.target):
            console.print(f"no lora on {listed(unmatched)}, which stay as they are", markup=False)
        rated = lora.target == "head" and any(goal.rate for goal in target.goals)
        if rated and isinstance(target, TiltedTarget) and not target.looks(lora, recipe.objective):
            console.print("the set head is one constant: a rate holds on average over kinds of prompts, not after each")
    contexts = {"random": "random tokens", "self": "tokens of the model's own"}.get(
        target.contexts(recipe.objective), f"tokens of {recipe.objective.contexts}"
    )
    objective = recipe.objective
    if lora is not None and lora.head and objective.early_stop and not objective.sequence_level:
        console.print(f"no training steps: the set head is solved, and calibrated on samples, seed {options.seed}")
        return
    console.print(
        f"train: {options.method}, {counted(options.steps, 'step')} of {options.batch_size} x {options.seq_len} "
        f"{contexts}, {options.optimizer} at {options.learning_rate:g}, seed {options.seed}"
    )


def rate_text(scores: Evaluation) -> str:
    low, high = scores.interval
    return f"{scores.rate:.4f} ({low:.4f}–{high:.4f})"


def kl_parts_text(scores: Evaluation) -> str:
    return " + ".join(f"{max(scores.kl_parts[name], 0):.3f}" for name in ("mass", "inside", "outside"))


def decoding_text(decoding: dict[str, Any]) -> str:
    """The decoding settings in words."""
    parts = [f"temperature {decoding['temperature']:g}"]
    parts.append(f"top-k {decoding['top_k']}" if decoding["top_k"] else "no top-k")
    parts.append(f"top-p {decoding['top_p']:g}" if decoding["top_p"] < 1 else "no top-p")
    samples = counted(decoding["prompts"] * decoding["repeats"], "sample")
    tokens = counted(decoding["max_new_tokens"], "token")
    return f"{', '.join(parts)}; {samples} of {tokens}, special tokens banned"


def print_scores(columns: dict[str, Evaluation]) -> None:
    """A table of evaluations side by side, with the decoding settings below."""
    rows = {
        "R (95 % interval)": rate_text,
        "spread of R between texts": lambda s: f"{s.spread:.3f}",
        "mass on the set": lambda s: f"{s.set_mass:.4f}",
        "KL from base, nats/token": lambda s: f"{s.kl_from_base:.3f}",
        "perplexity under base": lambda s: f"{s.perplexity:.1f}",
        "KL: mass + inside + outside": kl_parts_text,
        "distinct-2": lambda s: f"{s.distinct_2:.3f}",
        "distinct set tokens": lambda s: str(s.distinct_set_tokens),
    }
    print_columns(list(rows), {name: [show(s) for show in rows.values()] for name, s in columns.items()})
    decoding = next(iter(columns.values())).decoding
    console.print(f"R and the rest are of samples: {decoding_text(decoding)}", style="dim")


def print_summary(result: TrainResult, record: dict[str, Any], output: Path) -> None:
    """Loss, R before and after, parameters, time and memory."""
    steps = result.history
    console.print()
    if len(steps) > 1:
        console.print(f"loss {steps[0].loss:.4g} → {steps[-1].loss:.4g} nats")
    if result.before and result.after:
        print_scores({"before": result.before, "after": result.after})
    if result.rate:
        print_rate(result.rate, result.after)
    for warning in result.warnings:
        console.print(warning, style="bold red", markup=False)
    share = result.parameters / numbers(result.model)
    console.print(f"trainable parameters {result.parameters:,} ({100 * share:.3g} %)")
    if steps:
        pace = sorted(step.seconds for step in steps)[len(steps) // 2]
        console.print(f"time {result.seconds:.1f} s for {counted(len(steps), 'step')} (median {pace:.3f} s)")
    print_measured(result)
    console.print(f"saved to {output}")


def print_goals(name: str, scores: Evaluation) -> None:
    """R of every set of a mix (or of several goals)."""
    for goal in scores.goals:
        low, high = goal["interval"]
        rule = Rule.from_record(goal["rule"]).describe()
        console.print(f"{name}: R of {rule} {goal['rate']:.4f} ({low:.4f}–{high:.4f}), spread {goal['spread']:.3f}")


def print_rate(report: RateReport, scores: Evaluation | None) -> None:
    """The rates reached against those wanted, and the price against the frontier."""
    if report.wanted and scores:
        goals = scores.goals or ({"rate": scores.rate, "interval": scores.interval, "spread": scores.spread},)
        for wanted, goal in zip(report.wanted, goals, strict=True):
            low, high = goal["interval"]
            name = f" of {Rule.from_record(goal['rule']).describe()}" if "rule" in goal else ""
            console.print(
                f"wanted R{name} {wanted:g}, sampled {goal['rate']:.4f} ({low:.4f}–{high:.4f}), "
                f"spread between texts {goal['spread']:.3f}",
                markup=False,
            )
    strengths = ", ".join(f"{value:.3f}" for value in report.strengths)
    console.print(f"lambda {strengths}" + (f"; {report.stopped}" if report.stopped else ""))
    if scores:
        print_frontier("KL", scores, report.frontier)
    if report.head:
        print_head(report.head)
    if report.dial:
        pairs = "  ".join(f"{scale:g}: {rate:.4f}" for scale, rate in report.dial)
        console.print(f"dial, scale: R  {pairs}")


def print_head(head: HeadReport) -> None:
    """Expected rates after every family of prompts, beside those of one constant, and the price."""
    reached = [
        ", ".join(f"{r:.4f} ({low:.4f}–{high:.4f})" for r, (low, high) in zip(rates, intervals, strict=True))
        for rates, intervals in zip(head.rates, head.intervals, strict=True)
    ]
    plain, strengths = (
        [", ".join(f"{x:.3f}" for x in row) for row in rows] for rows in (head.rates_of_constant, head.strengths)
    )
    spreads = [", ".join(f"{x:.3f}" for x in row) for row in head.spreads]
    console.print("after every kind of text; beside it R under one constant for all, lambda, and what each alone needs")
    columns = {"R (95 % interval)": reached, "spread": spreads, "one constant": plain, "own lambda": strengths}
    print_columns(list(head.families), columns)
    console.print(
        f"the price: KL {head.kl:.4f} nats/token, {head.price:.3f} x that of one constant, with the same mean rate; "
        f"{head.kl / head.kl_of_teacher:.3f} x that of a constant for each kind, with the same rates"
    )
    if head.price > MOST_PRICE:
        console.print("the same rate everywhere is dear here; --same-rate on-average costs less", style="yellow")


def print_frontier(name: str, scores: Evaluation, frontier: Frontier | None) -> None:
    """KL against that of the exact logit bias at the same rate."""
    if frontier:
        console.print(
            f"{name}: {scores.kl_from_base:.4f} nats/token, {frontier.ratio:.3f} x that of an exact logit bias at the "
            f"same rate ({frontier.kl:.4f}, lambda {frontier.strength:.2f})",
        )
