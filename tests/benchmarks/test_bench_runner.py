"""The benchmark's loop with a worker that trains nothing: every run leaves a row, failed ones too; resume; checks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bench import arms, runner, store
from benchmarks.bench.plan import Run, plan
from benchmarks.bench.presets import PRESETS, Preset, Settings
from benchmarks.bench.progress import Durations, clock
from benchmarks.bench.report import write_report
from xfactor_peft.errors import XFactorError

ROOT = Path(__file__).resolve().parents[2]

PRESET = Preset(
    "test",
    (arms.FULL, arms.LORA_INT8),
    Settings(steps=20, probe_every=5),
    seeds=(0, 1),
    rates={"lora": (1e-3, 1e-2), "full": (1e-3, 3e-3)},
    source=Settings(contains="x"),
    source_rates={"full": (1e-4,), "lora": (1e-3,)},
    shape_arms=(arms.FULL, arms.LORA_INT8),
)
FILES = {run.file for batch in plan(PRESET, "demo") for run in batch}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """run(preset, **options) -> names of the runs that a worker was asked for."""
    monkeypatch.setattr(runner, "made_models", lambda model, shape: {})
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))

    def run(preset=PRESET, **options) -> list[str]:
        (tmp_path / "log").write_text("")
        worker = (sys.executable, str(ROOT / "tests" / "benchmarks" / "bench_stub.py"))
        runner.run_preset(preset, runner.Options(tmp_path / "out", worker=worker, **options))
        return (tmp_path / "log").read_text().split()

    run.folder = tmp_path / "out"
    run.record = lambda name: store.read(run.folder / "runs" / name)
    return run


def test_every_run_leaves_a_record_and_is_not_run_twice(bench):
    assert set(bench()) == FILES == {file.name for file in (bench.folder / "runs").iterdir()}
    assert len(FILES) == 1 + 2 + 4 + 3 + 2
    assert bench() == []


def test_the_learning_rate_comes_from_the_sweep(bench):
    bench()
    assert bench.record("demo-train-lora-r8-all-int8-seed1.json")["spec"]["lr"] == 1e-2
    assert bench.record("demo-train-full-fp32-seed0.json")["spec"]["lr"] == 3e-3
    assert bench.record("demo-source-full-fp32-adamw-lr0.0001-seed0.json")["spec"]["lr"] == 1e-4


def test_only_the_first_run_of_a_process_counts_as_fresh(bench):
    bench()
    fresh = {name: bench.record(name)["fresh_process"] for name in FILES if "train" in name}
    assert fresh == {name: "seed0" in name for name in fresh}


def test_an_interrupted_benchmark_goes_on_where_it_was(bench):
    bench()
    lost = {"demo-train-full-fp32-seed1.json", "gpt2-medium-shape-shape-full-fp32.json"}
    for name in lost:
        (bench.folder / "runs" / name).unlink()
    half = bench.folder / "runs" / "demo-base-base.json"
    half.write_text(half.read_text()[:40])
    assert set(bench()) == lost | {half.name}


@pytest.mark.parametrize("change", ["steps", "weights", "threads"])
def test_other_settings_weights_or_threads_are_measured_anew(bench, monkeypatch, change):
    bench()
    if change == "steps":
        again = bench(replace(PRESET, settings=replace(PRESET.settings, steps=21)))
        assert {name for name in FILES if "-train-" in name} < set(again)
        assert not any("source" in name or "shape" in name for name in again)
    elif change == "weights":
        monkeypatch.setenv("STUB_WEIGHTS", "others")
        assert set(bench()) == {name for name in FILES if "shape" not in name}
    else:
        assert set(bench(threads=3)) == FILES


def test_a_killed_arm_keeps_its_row_and_the_others_go_on(bench, monkeypatch):
    monkeypatch.setenv("STUB_KILL", "train-full-fp32-seed0")
    assert set(bench()) == FILES
    row = bench.record("demo-train-full-fp32-seed0.json")
    assert row["status"] == "out of memory"
    assert "killed" in row["error"]
    assert bench.record("demo-train-full-fp32-seed1.json")["status"] == "ok"
    assert bench() == []  # a failure is a result, too
    monkeypatch.delenv("STUB_KILL")
    assert bench(retry=True) == ["demo-train-full-fp32-seed0.json"]
    assert bench.record("demo-train-full-fp32-seed0.json")["status"] == "ok"


def test_what_a_dying_process_said_is_in_its_row(bench, monkeypatch):
    monkeypatch.setenv("STUB_EXIT", "shape-full")
    bench()
    row = bench.record("gpt2-medium-shape-shape-full-fp32.json")
    assert row["status"] == "failed"
    assert "no more bits" in row["error"]


def test_arms_without_a_learning_rate_say_so(bench, monkeypatch):
    monkeypatch.setenv("STUB_RAISE", "sweep-full")
    asked = bench()
    assert not any("train-full" in name for name in asked)
    row = bench.record("demo-train-full-fp32-seed0.json")
    assert row["status"] == "failed"
    assert "the sweep failed (lost its way)" in row["error"]
    monkeypatch.delenv("STUB_RAISE")
    assert set(bench(retry=True)) == {name for name in FILES if "-full-fp32" in name and "train" in name} | {
        "demo-sweep-full-fp32.json"
    }


def test_nothing_is_timed_or_shown_when_a_check_fails(bench, monkeypatch):
    bench()
    monkeypatch.setenv("STUB_CHECK", "bad")
    with pytest.raises(XFactorError, match=r"fused against eager: relative error 0\.5, limit 1e-05"):
        bench()
    assert (bench.folder.parent / "log").read_text() == ""
    with pytest.raises(XFactorError, match="no figure shown"):
        write_report(bench.folder)


def test_a_report_needs_checks(bench):
    bench()
    (bench.folder / "checks.json").unlink()
    with pytest.raises(XFactorError, match="correctness checks"):
        write_report(bench.folder)


def test_runs_survive_json():
    for preset in PRESETS.values():
        for batch in plan(preset, "demo", "openai-community/gpt2-medium"):
            for run in batch:
                assert Run.of(json.loads(json.dumps(run.spec()))) == run


@pytest.mark.parametrize("name", list(PRESETS))
def test_no_two_runs_of_a_preset_share_a_file(name):
    runs = [run for batch in plan(PRESETS[name], "demo", "openai-community/gpt2-medium") for run in batch]
    assert len({run.file.lower() for run in runs}) == len(runs)  # also where file names ignore case


def test_presets_hold_what_the_benchmark_promises():
    full, paper, quick = (PRESETS[name] for name in ("full", "paper", "quick"))
    lora = [arm for arm in full.arms if arm.method == "lora"]
    assert {arm.target for arm in lora} == {"attention", "mlp", "all"}
    assert {arm.r for arm in lora} == {1, 4, 8, 16}
    for preset in (full, paper, quick):
        assert {"int8", "nf4", "fp32", "bf16"} <= {arm.precision for arm in preset.arms}
        assert {arm.optimizer for arm in preset.arms if arm.method == "full"} >= {"adam", "adam8bit"}
        assert len(preset.seeds) >= 3
        assert preset.shape == "gpt2-medium"
    rates = {run.lr for batch in plan(paper, "demo") for run in batch if run.group == "source" and run.lr}
    assert rates == {1e-6, 1e-5, 1e-4, 1e-3}
    assert paper.source.steps == 300


def test_time_left():
    durations, first, second = Durations(), *(Run("train", arm, "demo", Settings()) for arm in PRESET.arms)
    assert durations.left([first, second]) is None
    durations.add(first, 10.0)
    assert durations.left([first, second]) == 20.0
    assert durations.left([first, second], share_done=0.5) == 15.0
    assert clock(3725) == "1:02:05"
    assert clock(65) == "1:05"
