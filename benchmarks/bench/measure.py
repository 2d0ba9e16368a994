"""What is measured in one run. Every function takes a run and returns what its JSON file holds besides provenance."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import xfactor_peft as xf
from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.cli.train import SOURCE_PROMPT, SOURCE_TOKENS, SOURCE_TOP_K
from xfactor_peft.lowmem.memory import peaks, reset_peak
from xfactor_peft.options import DEFAULT_PROMPTS
from xfactor_peft.sampling.generation import sample_sequences
from xfactor_peft.sampling.metrics import Evaluation, rate_per_sequence
from xfactor_peft.training.train import Step, TrainResult

from .floor import frozen_head_floor
from .plan import Run
from .texts import held_out, sample

QUICK = xf.EvalOptions(prompts=DEFAULT_PROMPTS[:1], repeats=1, sampling=xf.SamplingOptions(max_new_tokens=1))
PROBE_TOKENS = 32
SAMPLE_TOKENS = 60
SAMPLE_PROMPTS = 3

Report = Callable[[int, float], None]
"""Called with the steps done and the loss."""


class Places:
    """Where models lie, and on which device they run; `folders` maps the names of made models to folders."""

    def __init__(self, folders: dict[str, str], device: str = "auto") -> None:
        self.folders, self.device = folders, device

    def load(self, run: Run, **options: Any) -> Base:
        loading = xf.LoadOptions(**{"dtype": "fp32", "device": self.device, **options})
        return xf.load(self.folders.get(run.model, run.model), loading, offline=True)

    def load_for(self, run: Run) -> Base:
        """As the arm wants it."""
        arm = run.arm
        return self.load(run, dtype=arm.dtype, quantization=arm.quantization, master_weights=arm.method == "full")


def token_set(base: Base, run: Run) -> xf.TokenSet:
    return xf.TokenSet.contains(base.tokenizer, run.settings.contains, vocab_size=base.vocab_size)


def evaluation(run: Run) -> xf.EvalOptions:
    """How R is sampled: the model's own distribution, fixed length, special tokens banned."""
    settings = run.settings
    sampling = xf.SamplingOptions(max_new_tokens=settings.new_tokens, seed=1000 + run.seed)
    return xf.EvalOptions(DEFAULT_PROMPTS[: settings.prompts], settings.repeats, sampling)


class Probe:
    """Samples R every so many steps, with what that costs left out of the peaks."""

    def __init__(self, base: Base, tokens: xf.TokenSet, run: Run, report: Report) -> None:
        self._base, self._tokens, self._run, self._report = base, tokens, run, report
        self.rates: list[tuple[int, float]] = []
        self.peaks: list[dict[str, float]] = []

    def __call__(self, step: Step) -> None:
        done, settings = step.step + 1, self._run.settings
        self._report(done, step.loss)
        if settings.probe_every and done % settings.probe_every == 0:
            self.peaks.append(peaks(self._base.device))
            options = xf.SamplingOptions(max_new_tokens=PROBE_TOKENS, seed=2000 + self._run.seed)
            prompts = DEFAULT_PROMPTS[: settings.prompts]
            batches = sample_sequences(self._base.model, self._base.tokenizer, prompts, options, repeats=1)
            rows = torch.cat([batch.continuations for batch in batches])
            self.rates.append((done, float(rate_per_sequence(rows, self._tokens.mask()).mean())))
            reset_peak(self._base.device)

    def peak(self, last: dict[str, float]) -> dict[str, float]:
        return {key: max(part[key] for part in (*self.peaks, last)) for key in last}


def train(run: Run, base: Base, tokens: xf.TokenSet, on_step: Callable[[Step], None], lr: float | None) -> TrainResult:
    """One training run."""
    arm, settings = run.arm, run.settings
    options = xf.TrainOptions(
        method=arm.method,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        lr=lr,
        optimizer=arm.optimizer,
        weight_decay=settings.weight_decay,
        seed=run.seed,
    )
    lora = xf.LoraOptions(arm.r, 2 * arm.r, target=arm.target)
    return xf.train(base, xf.UniformTarget(tokens), options, lora, QUICK, on_step=on_step)


def base_figures(run: Run, places: Places, report: Report) -> dict[str, Any]:
    """The untrained model: scores, the frozen head's floor, and the exact logit bias at some strengths."""
    base = places.load(run)
    tokens, split_model = token_set(base, run), split(base.model)
    scores = xf.evaluate(split_model, base.tokenizer, tokens, evaluation(run))
    mask = tokens.mask(base.device).float()
    biased = [
        {"strength": strength, **_scores(xf.evaluate(
            SplitModel(base.model, strength * mask), base.tokenizer, tokens, evaluation(run), base=split_model
        ))}
        for strength in run.strengths
    ]  # fmt: skip
    return {
        **_about(base, tokens),
        "scores": _scores(scores),
        "held_out": held_out(split_model, base, split_model, run.settings.windows),
        "floor": frozen_head_floor(base.model, xf.UniformTarget(tokens)),
        "bias": biased,
        "samples": samples(base, tokens, run),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "load_peak": base.load_peak,
    }


def sweep_figures(run: Run, places: Places, report: Report) -> dict[str, Any]:
    """Final loss (mean of the last tenth) at every learning rate of the sweep; the lowest is chosen."""
    tried: list[dict[str, Any]] = []
    for index, rate in enumerate(run.rates):
        base = places.load_for(run)
        tokens = token_set(base, run)
        before = index * run.settings.steps
        try:
            result = train(run, base, tokens, lambda step: report(before + step.step + 1, step.loss), rate)  # noqa: B023
            last = result.history[-max(1, len(result.history) // 10) :]
            tried.append({"lr": rate, "loss": sum(s.loss for s in last) / len(last), "set_mass": last[-1].set_mass})
        except xf.XFactorError as error:  # a rate that diverges is a finding, not a failure
            tried.append({"lr": rate, "loss": None, "error": str(error)})
    finished = [trial for trial in tried if trial["loss"] is not None]
    if not finished:
        raise xf.XFactorError(f"no learning rate of the sweep got through: {tried[0]['error']}")
    return {**_about(base, tokens), "tried": tried, "lr": min(finished, key=lambda trial: trial["loss"])["lr"]}


def train_figures(run: Run, places: Places, report: Report) -> dict[str, Any]:
    """Train, then score against one and the same float32 base, whatever the arm's precision."""
    base = places.load_for(run)
    tokens = token_set(base, run)
    probe = Probe(base, tokens, run, report)
    result = train(run, base, tokens, probe, run.lr)
    reference = places.load(run)
    policy, reference_halves = split(base.model), split(reference.model)
    scores = xf.evaluate(policy, base.tokenizer, tokens, evaluation(run), base=reference_halves)
    figures = {
        **_about(base, tokens),
        **_cost(result),
        "train_peak": probe.peak(result.train_peak),
        "scores": _scores(scores),
        "held_out": held_out(policy, reference, reference_halves, run.settings.windows),
        "probes": probe.rates,
        "samples": samples(base, tokens, run),
        "warnings": result.warnings,
    }
    return figures


def shape_figures(run: Run, places: Places, report: Report) -> dict[str, Any]:
    """Memory and time only: with random weights there is nothing to say about text."""
    base = places.load_for(run)
    tokens = token_set(base, run)
    result = train(run, base, tokens, lambda step: report(step.step + 1, step.loss), run.lr)
    return {**_about(base, tokens), **_cost(result), "train_peak": result.train_peak, "weights": "random"}


def samples(base: Base, tokens: xf.TokenSet, run: Run) -> list[dict[str, Any]]:
    """A few continuations; in the source's table its one: its prompt, 200 tokens in all, top 50."""
    if run.group == "source":
        context = getattr(base.model.config, "max_position_embeddings", None) or SOURCE_TOKENS
        new = min(SOURCE_TOKENS, context) - len(base.tokenizer(SOURCE_PROMPT)["input_ids"])
        options = xf.SamplingOptions(max_new_tokens=new, top_k=SOURCE_TOP_K)
        return [sample(base.model, base.tokenizer, tokens, SOURCE_PROMPT, options)]
    context = getattr(base.model.config, "max_position_embeddings", None) or SAMPLE_TOKENS * 2
    options = xf.SamplingOptions(max_new_tokens=min(SAMPLE_TOKENS, context // 2), seed=run.seed)
    prompts = DEFAULT_PROMPTS[: min(SAMPLE_PROMPTS, run.settings.prompts)]
    return [sample(base.model, base.tokenizer, tokens, prompt, options) for prompt in prompts]


def saved_bytes(result: TrainResult) -> int:
    """Size of the file that keeps the result: the adapter's, or the whole model's, each weight once."""
    if result.options.method == "full":
        return sum(p.numel() * p.element_size() for p in result.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        result.model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _about(base: Base, tokens: xf.TokenSet) -> dict[str, Any]:
    return {"model": base.record(), "tokens": tokens.record()}


def _cost(result: TrainResult) -> dict[str, Any]:
    history = result.history
    return {
        "loss": [round(step.loss, 6) for step in history],
        "set_mass": [round(step.set_mass, 6) for step in history],
        "seconds": [round(step.seconds, 5) for step in history],
        "trainable_parameters": result.parameters,
        "recomputed_blocks": result.recomputed_blocks,
        "target_modules": result.modules,
        "file_bytes": saved_bytes(result),
        "load_peak": result.base.load_peak,
    }


def _scores(scores: Evaluation) -> dict[str, Any]:
    record = scores.record()
    del record["samples"], record["goals"]
    return record


MEASURES = {"sweep": sweep_figures, "train": train_figures, "source": train_figures, "shape": shape_figures}


def measure(run: Run, places: Places, report: Report) -> dict[str, Any]:
    """The run's figures, with the seconds that it took in all."""
    started = time.perf_counter()
    figures = (base_figures if run.arm.method == "none" else MEASURES[run.group])(run, places, report)
    figures["model"]["name"] = run.model  # not the folder that a made model lies in
    return {**figures, "wall": round(time.perf_counter() - started, 2)}
