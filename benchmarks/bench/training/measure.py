"""What is measured in one run. Every function takes a run and returns what its record holds besides provenance."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import xfactor_peft as xf
from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.cli.train import SOURCE_PROMPT, SOURCE_TOKENS, SOURCE_TOP_K
from xfactor_peft.lowmem.memory import peaks, reset_peak
from xfactor_peft.options import DEFAULT_PROMPTS
from xfactor_peft.sampling.metrics import Evaluation
from xfactor_peft.training.train import Step, TrainResult

from ..process import OnStep
from ..store import Record
from .floor import frozen_head_floor
from .metrics import final_loss
from .plan import Run
from .texts import held_out, sample

PROBE_TOKENS, SAMPLE_TOKENS, SAMPLE_PROMPTS = 32, 60, 3
UNFINISHED = "The old man looked at her and said"
RAISED = 20.0
"""Nats by which a set head raises its set here: e^-20 of the mass outside is left."""


class Models:
    """Where models lie, and on which device they run; `folders` maps the names of made models to folders."""

    def __init__(self, folders: dict[str, str], device: str = "auto") -> None:
        self.folders, self.device = folders, device

    def load(self, model: str, **options: Any) -> Base:
        loading = xf.LoadOptions(**{"dtype": "fp32", "device": self.device, **options})
        return xf.load(self.folders.get(model, model), loading, offline=True)

    def load_for(self, run: Run) -> Base:
        """As the arm wants it."""
        arm = run.arm
        return self.load(run.model, dtype=arm.dtype, quantization=arm.quantization, master_weights=arm.method == "full")


def measure(spec: Record, on_step: OnStep, folders: dict[str, str], device: str) -> Record:
    """The figures of a run, given as its `Run.spec()`."""
    run = Run.of(spec)
    return (base_figures if run.arm.method == "none" else MEASURES[run.group])(run, Models(folders, device), on_step)


def token_set(base: Base, run: Run) -> xf.TokenSet:
    return xf.TokenSet.contains(base.tokenizer, run.settings.contains, vocab_size=base.vocab_size)


def evaluation(run: Run) -> xf.EvalOptions:
    """How R is sampled: the model's own distribution, fixed length, special tokens banned."""
    settings = run.settings
    sampling = xf.SamplingOptions(max_new_tokens=settings.new_tokens, seed=1000 + run.seed)
    return xf.EvalOptions(DEFAULT_PROMPTS[: settings.prompts], settings.repeats, sampling)


class Probe:
    """Samples R every so many steps, with what that costs left out of the peaks."""

    def __init__(self, base: Base, run: Run, on_step: OnStep) -> None:
        self._base, self._tokens, self._run, self._on_step = base, token_set(base, run), run, on_step
        self.rates: list[tuple[int, float]] = []
        self.peaks: list[dict[str, float]] = []

    def __call__(self, step: Step) -> None:
        done, settings = step.step + 1, self._run.settings
        self._on_step(done, step.loss)
        if settings.probe_every and done % settings.probe_every == 0:
            self.peaks.append(peaks(self._base.device))
            options = xf.SamplingOptions(max_new_tokens=PROBE_TOKENS, seed=2000 + self._run.seed)
            brief = xf.EvalOptions(DEFAULT_PROMPTS[: settings.prompts], 1, options)
            scores = xf.evaluate(split(self._base.model), self._base.tokenizer, self._tokens, brief)
            self.rates.append((done, scores.rate))
            reset_peak(self._base.device)

    def peak(self, last: dict[str, float]) -> dict[str, float]:
        return {key: max(part[key] for part in (*self.peaks, last)) for key in last}


def train(run: Run, base: Base, on_step: Callable[[Step], None], lr: float | None) -> TrainResult:
    """One training run."""
    arm, settings, target = run.arm, run.settings, xf.UniformTarget(token_set(base, run))
    sizes = {key: getattr(settings, key) for key in ("steps", "batch_size", "seq_len", "weight_decay")}
    options = xf.TrainOptions(method=arm.method, lr=lr, optimizer=arm.optimizer, seed=run.seed, **sizes)
    if arm.target.endswith(",head"):
        raise_set(base, target.tokens)
    lora = xf.LoraOptions(arm.r, 2 * arm.r, target=arm.target.removesuffix(",head"))
    return xf.train(base, target, options, lora, None, on_step=on_step)


def raise_set(base: Base, tokens: xf.TokenSet, by: float = RAISED) -> None:
    """Give the output embedding a frozen bias on the set's tokens, as a set head with a constant does.

    A uniform target wants no mass outside, so that the best constant is as large as one likes.
    """
    head = base.model.get_output_embeddings()
    bias = by * tokens.mask(base.device).to(head.weight.dtype)
    head.bias = nn.Parameter(bias if head.bias is None else head.bias.detach() + bias, requires_grad=False)


def base_figures(run: Run, models: Models, on_step: OnStep) -> Record:
    """The untrained model: scores, the frozen head's floor, and the exact logit bias at some strengths."""
    base = models.load(run.model)
    tokens, split_model = token_set(base, run), split(base.model)
    return {
        **_about(base, run),
        "scores": _scores(xf.evaluate(split_model, base.tokenizer, tokens, evaluation(run))),
        "held_out": held_out(split_model, base, split_model, run.settings.windows),
        **floors(base, tokens),
        "bias": bias_curve(base, tokens, run.strengths, evaluation(run)),
        "samples": samples(base, run),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "load_peak": base.load_peak,
    }


def floors(base: Base, tokens: xf.TokenSet) -> dict[str, float | None]:
    """The lowest loss with the head as it is, and with the set raised out of reach of all others."""
    target = xf.UniformTarget(tokens)
    return {"floor": frozen_head_floor(base.model, target), "head_floor": frozen_head_floor(base.model, target, RAISED)}


def bias_curve(base: Base, tokens: xf.TokenSet, strengths: tuple[float, ...], options: xf.EvalOptions) -> list[Record]:
    """Scores of an exact logit bias on the set, which no training enters, at each of the strengths."""
    split_model, mask, found = split(base.model), tokens.mask(base.device).float(), []
    for strength in strengths:
        tilted = SplitModel(base.model, strength * mask)
        scores = xf.evaluate(tilted, base.tokenizer, tokens, options, base=split_model)
        found.append({"strength": strength, **_scores(scores)})
    return found


def sweep_figures(run: Run, models: Models, on_step: OnStep) -> Record:
    """Final loss (mean of the last tenth) at every learning rate of the sweep; the lowest is chosen."""
    tried: list[Record] = []
    for rate in run.rates:
        base, before = models.load_for(run), len(tried) * run.settings.steps
        try:
            result = train(run, base, lambda step: on_step(before + step.step + 1, step.loss), rate)  # noqa: B023
        except xf.XFactorError as error:  # a rate that diverges is a finding, not a failure
            tried.append({"lr": rate, "loss": None, "error": str(error)})
        else:
            loss = final_loss({"loss": [step.loss for step in result.history]})
            tried.append({"lr": rate, "loss": loss, "set_mass": result.history[-1].set_mass})
    finished = [trial for trial in tried if trial["loss"] is not None]
    if not finished:
        raise xf.XFactorError(f"no learning rate of the sweep got through: {tried[0]['error']}")
    return {**_about(base, run), "tried": tried, "lr": min(finished, key=lambda trial: trial["loss"])["lr"]}


def train_figures(run: Run, models: Models, on_step: OnStep) -> Record:
    """Train, then score against one and the same float32 base, whatever the arm's precision."""
    base = models.load_for(run)
    probe = Probe(base, run, on_step)
    result = train(run, base, probe, run.lr)
    reference = models.load(run.model)
    policy, untrained, tokens = split(base.model), split(reference.model), token_set(base, run)
    return {
        **_about(base, run),
        **_cost(result),
        "train_peak": probe.peak(result.train_peak),
        "scores": _scores(xf.evaluate(policy, base.tokenizer, tokens, evaluation(run), base=untrained)),
        "held_out": held_out(policy, reference, untrained, run.settings.windows),
        "probes": probe.rates,
        "samples": samples(base, run),
        "warnings": result.warnings,
    }


def shape_figures(run: Run, models: Models, on_step: OnStep) -> Record:
    """Memory and time only."""
    base = models.load_for(run)
    result = train(run, base, lambda step: on_step(step.step + 1, step.loss), run.lr)
    return {**_about(base, run), **_cost(result)}


MEASURES = {
    "sweep": sweep_figures,
    "train": train_figures,
    "source": train_figures,
    "places": train_figures,
    "shape": shape_figures,
}


def samples(base: Base, run: Run) -> list[Record]:
    """A few continuations; in the source's table its one: its prompt, 200 tokens in all, top 50.

    After it one of a sentence that is not finished, for a chat model may end its text after a whole one.
    """
    context, tokens = getattr(base.model.config, "max_position_embeddings", None) or SOURCE_TOKENS, token_set(base, run)
    if run.group in ("source", "places"):
        lengths = {text: len(base.tokenizer(text)["input_ids"]) for text in (SOURCE_PROMPT, UNFINISHED)}
        left = {text: min(SOURCE_TOKENS, context) - length for text, length in lengths.items()}
        options = {text: xf.SamplingOptions(max_new_tokens=new, top_k=SOURCE_TOP_K) for text, new in left.items()}
    else:
        same = xf.SamplingOptions(max_new_tokens=min(SAMPLE_TOKENS, context // 2), seed=run.seed)
        options = dict.fromkeys(DEFAULT_PROMPTS[: min(SAMPLE_PROMPTS, run.settings.prompts)], same)
    return [sample(base, tokens, prompt, how) for prompt, how in options.items()]


def saved_bytes(result: TrainResult) -> int:
    """Size of the file that keeps the result: the adapter's, or the whole model's, each weight once."""
    if result.options.method == "full":
        return sum(p.numel() * p.element_size() for p in result.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        result.model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _about(base: Base, run: Run) -> Record:
    return {"model": {**base.record(), "name": run.model}, "tokens": token_set(base, run).record()}


def _cost(result: TrainResult) -> Record:
    digits = {"loss": 6, "set_mass": 6, "seconds": 5}
    return {
        **{key: [round(getattr(step, key), n) for step in result.history] for key, n in digits.items()},
        "trainable_parameters": result.parameters,
        "recomputed_blocks": result.recomputed_blocks,
        "target_modules": result.modules,
        "file_bytes": saved_bytes(result),
        "load_peak": result.base.load_peak,
        "train_peak": result.train_peak,
    }


def _scores(scores: Evaluation) -> Record:
    return {key: value for key, value in scores.record().items() if key not in ("samples", "goals")}
