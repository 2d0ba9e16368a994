"""The presets: which arms, how many steps and seeds, which learning rates are tried."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from . import arms
from .arms import Arm

LEARNING_RATES = {
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "adafactor": (1e-2, 3e-2, 1e-1, 3e-1),  # relative to the size of the weights
}
"""The sweep, by method; Adafactor's rates mean something else, so it has its own."""

SOURCE_RATES = {"full": (1e-6, 1e-4), "lora": (1e-6, 1e-5, 1e-4, 1e-3)}
"""The source's two rates; for LoRA also ten times each."""


@dataclass(frozen=True)
class Settings:
    """What the arms of a group have in common.

    Attributes:
        steps, batch_size, seq_len, weight_decay: of training.
        contains: the token set is every token that contains this text.
        prompts, repeats, new_tokens: R is over prompts x repeats samples of `new_tokens` tokens.
        probe_every: R is also sampled every so many steps, from fewer texts, for "steps to R >= 0.9"; 0 is never.
        windows: held-out text is scored on so many windows.
    """

    steps: int = 300
    batch_size: int = 4
    seq_len: int = 64
    weight_decay: float = 0.0
    contains: str = "X"
    prompts: int = 16
    repeats: int = 4
    new_tokens: int = 64
    probe_every: int = 25
    windows: int = 48


@dataclass(frozen=True)
class RealPlan:
    """What is trained on a real model, where one lies in `models.REAL`; everything on one seed.

    Attributes:
        sources: the source's table, once for each settings (a letter each).
        source_rates: by method.
        places: settings of the table of ranks, places and precisions; their learning rates are `PLACE_RATES`.
        place_arms: its arms.
        cost_arms: memory and time of these, over a few steps.
    """

    sources: tuple[Settings, ...] = ()
    source_rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: SOURCE_RATES)
    places: Settings | None = None
    place_arms: tuple[Arm, ...] = ()
    cost_arms: tuple[Arm, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A benchmark of a size.

    Attributes:
        arms, seeds: each arm is trained once a seed, at the learning rate that its sweep on seed 0 chose.
        sweep_steps, rates: of the sweep.
        source, source_rates: also the source's table at these rates, on seed 0.
        shape, shape_arms, shape_steps: memory and time with random weights at a model's true shape.
        real: the source's table on GPT-2 Medium, too, if its weights can be had.
        pretrained: what is trained on a real model, where there is one.
        strengths: of the exact logit bias that the R-against-KL plot shows for comparison.
    """

    name: str
    arms: tuple[Arm, ...]
    settings: Settings = Settings()
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep_steps: int = 60
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: LEARNING_RATES)
    source: Settings | None = None
    source_rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: SOURCE_RATES)
    shape: str = "gpt2-medium"
    shape_arms: tuple[Arm, ...] = ()
    shape_steps: int = 5
    real: bool = False
    pretrained: RealPlan = RealPlan()
    strengths: tuple[float, ...] = (2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0)

    def rates_for(self, arm: Arm) -> tuple[float, ...]:
        return self.rates["adafactor" if arm.optimizer == "adafactor" else arm.method]


PLACE_RATES = {"lora": 1e-3, "full": 1e-4, "adafactor": 1e-3}
REAL_SOURCE = Settings(contains="x", weight_decay=0.01, probe_every=0, repeats=2, windows=16)
REAL_SOURCES = (REAL_SOURCE, replace(REAL_SOURCE, contains="X", steps=100))
PLACES = replace(REAL_SOURCE, steps=60, repeats=1, windows=8)
SOURCE = Settings(contains="x", weight_decay=0.01, probe_every=0)
TINY = {"seq_len": 16, "prompts": 1, "repeats": 4, "new_tokens": 8}
DEMO = Settings(steps=60, contains="x", repeats=2, probe_every=15, windows=16)
QUICK = Preset(
    "quick", arms.CORE, replace(DEMO, repeats=1, windows=8, probe_every=20),
    sweep_steps=20, rates={"lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3)},
    shape_arms=(arms.FULL, arms.FULL_8BIT_ADAM, arms.LORA_BF16, arms.LORA_INT8, arms.LORA_NF4), shape_steps=3,
    pretrained=RealPlan((replace(REAL_SOURCE, steps=30, repeats=1, windows=8),), {"full": (1e-4,), "lora": (1e-3,)}),
)  # fmt: skip
PAPER = Preset(
    "paper", arms.CORE, DEMO, sweep_steps=20, rates=QUICK.rates, source=SOURCE, shape_arms=arms.ALL, real=True,
    pretrained=RealPlan(REAL_SOURCES, places=PLACES, place_arms=(*arms.CROSS, *arms.OTHERS), cost_arms=arms.ALL),
)  # fmt: skip
FULL = Preset(
    "full", arms.ALL, replace(DEMO, steps=300), seeds=(0, 1, 2, 3, 4),
    source=SOURCE, shape_arms=arms.ALL, shape_steps=8, real=True,
    pretrained=RealPlan(
        (REAL_SOURCE, replace(REAL_SOURCE, contains="X")), places=PLACES, place_arms=(*arms.GRID, *arms.OTHERS),
        cost_arms=arms.ALL,
    ),
)  # fmt: skip
SMOKE = Preset(
    "smoke", (arms.FULL, Arm(dtype="fp32", quantization="int8", r=4)),
    Settings(steps=12, probe_every=6, windows=4, **TINY),
    seeds=(0, 1), sweep_steps=4, rates={"lora": (1e-3, 1e-2), "full": (1e-3, 1e-2)},
    source=Settings(steps=3, contains="x", weight_decay=0.01, probe_every=0, windows=2, **TINY),
    source_rates={"full": (1e-4,), "lora": (1e-3,)}, strengths=(3.0,),
    shape="tiny", shape_arms=(arms.FULL, Arm(dtype="fp32", quantization="nf4")), shape_steps=3,
)  # fmt: skip
PRESETS = {preset.name: preset for preset in (QUICK, PAPER, FULL, SMOKE)}
