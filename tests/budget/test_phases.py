"""Peaks of a run's phases, predicted: which there are, which is highest, and what a budget does to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from xfactor_peft import LoraOptions, MemoryOptions, ObjectiveOptions, Recipe, TrainOptions
from xfactor_peft.budget.dry_run import Shape, measure_step
from xfactor_peft.budget.phases import PROMPT, SAMPLING_BYTES, Course, predict_phases
from xfactor_peft.budget.plan import make_plan
from xfactor_peft.cli import main
from xfactor_peft.lowmem.kv_cache import token_bytes
from xfactor_peft.sampling.sampler import LEAST_BYTES

SHAPE = Shape("fp32", None, 4, 32, "lora", LoraOptions())
GIB = 2**30


def recipe(target: str = "all", **objective) -> Recipe:
    return Recipe(TrainOptions(), LoraOptions(target=target), objective=ObjectiveOptions(**objective))


@pytest.mark.parametrize(
    ("course", "names"),
    [
        (Course.of(recipe(), rate=False), ["load", "R before", "training", "R after", "saving"]),
        (Course.of(replace(recipe(), evaluation=None), rate=False), ["load", "training", "saving"]),
        (Course.of(recipe("head"), rate=True), ["load", "R before", "calibration", "R after", "dial", "saving"]),
        (Course.of(recipe("head", early_stop=False), rate=True),
         ["load", "R before", "calibration", "training", "R after", "dial", "saving"]),
        (Course.of(recipe("all,head", sequence_level=True), rate=True),
         ["load", "R before", "calibration", "planning texts", "R after", "dial", "saving"]),
    ],
)  # fmt: skip
def test_a_plan_has_the_phases_of_its_command(tiny_folders, course, names):
    plan = make_plan(tiny_folders["gpt2"], SHAPE, MemoryOptions(budget=GIB), time=False, course=course, baseline=1)
    assert [phase.name for phase in plan.phases] == names
    assert plan.total == max(phase.total for phase in plan.phases)
    record = plan.record()
    assert record["total"] == plan.total
    assert record["highest"] == plan.highest.name
    assert [phase["name"] for phase in record["phases"]] == names


def test_the_cache_of_samples_stays_within_the_limit(load_tiny):
    """A cache of at most what the limit leaves, never less than one text or `LEAST_BYTES`."""
    config = load_tiny().model.config
    config.n_layer = 2_000  # 2 * 2 000 * 64 * 4 bytes a token
    step = measure_step(load_tiny().model.config, SHAPE)
    course = Course(texts=64, new=20)
    row = token_bytes(config, next(load_tiny().model.parameters()).dtype) * (PROMPT + 20)

    def sampling(limit: int) -> int:
        phases = predict_phases(config, step, SHAPE, course, 0, baseline=1, limit=limit)
        return next(phase.total for phase in phases if phase.name == "R before")

    least, much, more = sampling(1), sampling(GIB), sampling(2 * GIB)
    assert much == more, "a cache takes 128 MiB at most"
    assert much - least == pytest.approx((128 * 2**20 // row - max(1, LEAST_BYTES // row)) * row, rel=0.1)
    tight = least + SAMPLING_BYTES + 40 * row
    assert least < sampling(tight) <= tight


def test_what_cannot_fit_is_refused_before_weights_are_read(tmp_path, tiny_folders, monkeypatch):
    monkeypatch.setattr("xfactor_peft.base.loading.load_base", lambda *_: pytest.fail("the model was loaded"))
    words = ["train", "--model", str(tiny_folders["gpt2"]), "--seq-len", "16", "--memory-budget", "50MiB"]
    done = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "more than the 50 MiB allowed" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
