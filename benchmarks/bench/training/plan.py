"""From a preset to runs: each is one JSON file, and a part of a table's line."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..process import Job
from . import arms
from .arms import Arm
from .presets import PLACE_RATES, Preset, RealPlan, Settings

GROUPS = ("base", "sweep", "train", "source", "places", "shape")
RUNS = "runs"
COST = Settings(steps=5, probe_every=0)


@dataclass(frozen=True)
class Run:
    """One arm on one model with one seed.

    Attributes:
        group: "base" (scores of the untrained model), "sweep" (of learning rates), "train", "source" (the source's
            table), "places" (ranks, places and precisions at one learning rate) or "shape" (memory and time with random
            weights).
        model: "demo", a Hub id, a folder, or "SHAPE-shape" for random weights.
        lr: None for a "train" run until its sweep is done.
        rates: what a sweep tries.
        strengths: of the exact logit bias that a "base" run also scores.
    """

    group: str
    arm: Arm
    model: str
    settings: Settings
    seed: int = 0
    lr: float | None = None
    rates: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()

    @property
    def file(self) -> str:
        model = re.sub(r"[^\w.-]+", "_", self.model.rstrip("/").split("/")[-1])
        rate = f"-lr{self.lr:g}" if self.group == "source" and self.lr else ""
        letter = "-capital" if self.group == "source" and self.settings.contains.isupper() else ""
        seed = f"-seed{self.seed}" if self.group in ("train", "source", "places") else ""
        return f"{model}-{self.group}{letter}-{self.arm.name}{rate}{seed}.json"

    @property
    def label(self) -> str:
        rate = f", lr {self.lr:g}" if self.group == "source" and self.lr else ""
        seed = f", seed {self.seed}" if self.group == "train" else ""
        model = f" {self.model} “{self.settings.contains}”" if self.group in ("source", "places") else ""
        return f"{self.group}{model}: {self.arm.label}{rate}{seed}"

    @property
    def kind(self) -> str:
        return f"{self.group} {self.model}"

    def spec(self) -> dict[str, Any]:
        """The whole setting, fit for JSON; a finished run with another one is run again."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Self:
        """The inverse of `spec`."""
        tuples = {name: tuple(spec[name]) for name in ("rates", "strengths")}
        return cls(**{**spec, **tuples, "arm": Arm(**spec["arm"]), "settings": Settings(**spec["settings"])})

    def job(self) -> Job:
        steps = self.settings.steps * max(1, len(self.rates)) if self.arm.method != "none" else 0
        return Job(f"{RUNS}/{self.file}", self.label, "training.measure:measure", self.spec(), self.kind, steps)


def plan(preset: Preset, model: str, real: str | None = None, pretrained: str | None = None) -> list[Run]:
    """Every run of a preset, in order: base, the source's table, sweeps, arms, the real model, the shape rows.

    Args:
        model: what the arms are trained on.
        real: GPT-2 Medium's name if its weights can be had; then the source's table is made on it, too.
        pretrained: the name of the real model that `preset.pretrained` is trained on, if there is one.
    """
    settings = preset.settings
    runs = [Run("base", arms.BASE, model, settings, strengths=preset.strengths)]
    for name in (model, real) if preset.source else ():
        runs += source_runs(name, preset.source, preset.source_rates) if name else []
    short = replace(settings, steps=preset.sweep_steps, probe_every=0)
    runs += [Run("sweep", arm, model, short, rates=preset.rates_for(arm)) for arm in preset.arms]
    runs += [Run("train", arm, model, settings, seed) for arm in preset.arms for seed in preset.seeds]
    runs += pretrained_runs(pretrained, preset.pretrained) if pretrained else []
    shape = replace(COST, steps=preset.shape_steps)
    return runs + [Run("shape", arm, f"{preset.shape}-shape", shape, lr=1e-4) for arm in preset.shape_arms]


def source_runs(model: str, settings: Settings, rates: dict[str, tuple[float, ...]]) -> list[Run]:
    """The base, then full fine-tuning and LoRA with AdamW at the source's rates, in float32 as there."""
    found = [Run("source", arms.BASE, model, settings)]
    for arm in (Arm("full", "fp32", optimizer="adamw"), Arm(dtype="fp32", optimizer="adamw")):
        found += [Run("source", arm, model, settings, lr=rate) for rate in rates[arm.method]]
    return found


def pretrained_runs(model: str, wanted: RealPlan) -> list[Run]:
    """The source's table for each letter, then ranks, places and precisions."""
    runs = [run for settings in wanted.sources for run in source_runs(model, settings, wanted.source_rates)]
    rates = ((arm, PLACE_RATES.get(arm.optimizer, PLACE_RATES[arm.method])) for arm in wanted.place_arms)
    runs += [Run("places", arm, model, wanted.places, lr=rate) for arm, rate in rates]
    return runs + [Run("shape", arm, model, COST, lr=1e-4) for arm in wanted.cost_arms]
