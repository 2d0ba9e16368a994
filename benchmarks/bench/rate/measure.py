"""Train and score one arm at one rate with one seed."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

import xfactor_peft as xf
from xfactor_peft.base.split_model import split
from xfactor_peft.lora.wrap import adapter_off

from ..process import OnStep
from ..store import Record
from ..training.measure import bias_curve
from .grpo import train_by_grpo

STRENGTHS = (0.0, 1.0, 2.0, 2.8, 3.3, 3.7, 4.2, 4.8, 5.4, 6.2, 7.5)


def measure(spec: Record, on_step: OnStep) -> Record:
    """The figures of {"arm", "wanted", "seed", "model", "dtype", "contains", "sequence_steps"}.

    The prompts of the scores are not those of the calibration, which starts from openings that the base writes.
    """
    arm, seed = spec["arm"], spec["seed"]
    options = xf.EvalOptions(repeats=16, sampling=xf.SamplingOptions(max_new_tokens=64, seed=1000 + seed))
    base = _load(spec)
    tokens = xf.TokenSet.contains(base.tokenizer, spec["contains"], ignore_case=True, vocab_size=base.vocab_size)
    about = {"base": base.record(), "tokens": tokens.record()}
    if arm == "bias":  # the frontier itself
        return {**about, "points": bias_curve(base, tokens, STRENGTHS, options)}
    started = time.process_time()
    if arm == "trl":
        model, figures = train_by_grpo(base, tokens, spec["wanted"], seed, spec["sequence_steps"])
    else:
        result = _train(base, tokens, spec, on_step)
        model, figures = result.model, {**result.record(), "before": None, "history": thin(result.history)}
    figures["cpu"] = time.process_time() - started
    reference = {"adapter_off": partial(adapter_off, model)}
    if arm == "uniform-full":
        reference = {"base": split(_load(spec).model)}
    scores = xf.evaluate(split(base.model), base.tokenizer, tokens, options, **reference)
    return {**figures, **about, "after": scores.record()}


def _load(spec: Record):
    return xf.load(spec["model"], xf.LoadOptions(dtype=spec["dtype"]), offline=True)


def _train(base, tokens: xf.TokenSet, spec: Record, on_step: OnStep):
    arm, steps = spec["arm"], spec["sequence_steps"]
    target = xf.UniformTarget(tokens) if arm.startswith("uniform") else xf.TiltedTarget.of(tokens, spec["wanted"])
    lora = None
    if arm.startswith("blocks-r"):
        r = int(arm.removeprefix("blocks-r"))
        lora = xf.LoraOptions(r=r, alpha=2 * r, target="all")
    kind, _, price = arm.partition("-w")
    planning = {"sequence_level": True, "sequence_steps": steps, "outside_price": float(price or 0)}
    objective = xf.ObjectiveOptions(dial=False, frontier=False, **(planning if kind == "sequence" else {}))
    options = xf.TrainOptions(method="full" if arm == "uniform-full" else "lora", seed=spec["seed"])
    return xf.train(
        base, target, options, lora, None, objective, on_step=lambda step: on_step(step.step + 1, step.loss)
    )


def thin(history: list) -> list[Record]:
    """Every step of a short run, every tenth of a long one."""
    return [asdict(step) for step in history[:: 10 if len(history) > 150 else 1]]
