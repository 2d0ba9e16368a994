"""The benchmark's loop with a worker that trains nothing: every run leaves a row, failed ones too; resume; checks."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench import process, store
from bench.process import Job, Place
from bench.session import Session, clock
from bench.training import arms, runner
from bench.training.plan import Run, plan
from bench.training.presets import PRESETS, Preset, Settings
from bench.training.report import write_report

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
FILES = {run.file for run in plan(PRESET, "demo")}


class Bench:
    """bench(preset, **options) -> names of the runs that a worker was asked for."""

    def __init__(self, root: Path) -> None:
        self.folder, self.log = root / "out", root / "log"

    def __call__(self, preset=PRESET, threads=1, **options) -> list[str]:
        self.log.write_text("")
        worker = (sys.executable, str(ROOT / "tests" / "benchmarks" / "bench_stub.py"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "made_models", lambda model, shape: {})
            patch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
            patch.setenv("STUB_LOG", str(self.log))
            runner.run_preset(preset, Place(self.folder, threads, worker=worker), "demo", **options)
        return self.log.read_text().split()

    def record(self, name: str) -> dict:
        return store.read(self.folder / "runs" / name)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark that has run, not to be changed."""
    bench = Bench(tmp_path_factory.mktemp("finished"))
    bench.asked = bench()
    return bench


@pytest.fixture
def again(finished, bench):
    """A copy of the finished benchmark."""
    shutil.copytree(finished.folder, bench.folder)
    return bench


def test_every_run_leaves_a_record_and_is_not_run_twice(finished, again):
    assert set(finished.asked) == FILES == {file.name for file in (finished.folder / "runs").iterdir()}
    assert len(FILES) == 1 + 2 + 4 + 3 + 2
    assert again() == []


def test_the_learning_rate_comes_from_the_sweep(again):
    assert again.record("demo-train-lora-r8-all-int8-seed1.json")["spec"]["lr"] == 1e-2
    assert again.record("demo-train-full-fp32-seed0.json")["spec"]["lr"] == 3e-3
    assert again.record("demo-source-full-fp32-adamw-lr0.0001-seed0.json")["spec"]["lr"] == 1e-4


def test_an_interrupted_benchmark_goes_on_where_it_was(again):
    lost = {"demo-train-full-fp32-seed1.json", "gpt2-medium-shape-shape-full-fp32.json"}
    for name in lost:
        (again.folder / "runs" / name).unlink()
    half = again.folder / "runs" / "demo-base-base.json"
    half.write_text(half.read_text()[:40])
    assert set(again()) == lost | {half.name}


@pytest.mark.parametrize("change", ["steps", "weights", "threads"])
def test_other_settings_weights_or_threads_are_measured_anew(again, monkeypatch, change):
    if change == "steps":
        asked = again(replace(PRESET, settings=replace(PRESET.settings, steps=21)))
        assert {name for name in FILES if "-train-" in name} < set(asked)
        assert not any("source" in name or "shape" in name for name in asked)
    elif change == "weights":
        monkeypatch.setenv("STUB_WEIGHTS", "others")
        assert set(again()) == {name for name in FILES if "shape" not in name}
    else:
        assert set(again(threads=3)) == FILES


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


def test_nothing_is_timed_or_shown_when_a_check_fails(again, monkeypatch):
    monkeypatch.setenv("STUB_CHECK", "bad")
    with pytest.raises(XFactorError, match=r"fused against eager: relative error 0\.5, limit 1e-05"):
        again()
    assert (again.folder.parent / "log").read_text() == ""
    with pytest.raises(XFactorError, match="no figure shown"):
        write_report(again.folder)


def test_a_report_needs_checks(again):
    (again.folder / "checks.json").unlink()
    with pytest.raises(XFactorError, match="correctness checks"):
        write_report(again.folder)


def test_runs_survive_json():
    for preset in PRESETS.values():
        for run in plan(preset, "demo", "openai-community/gpt2-medium"):
            assert Run.of(json.loads(json.dumps(run.spec()))) == run


@pytest.mark.parametrize("name", list(PRESETS))
def test_no_two_runs_of_a_preset_share_a_file(name):
    runs = plan(PRESETS[name], "demo", "openai-community/gpt2-medium")
    assert len({run.file.lower() for run in runs}) == len(runs)  # also where file names ignore case


def test_presets_hold_what_the_benchmark_promises():
    full, paper, quick = (PRESETS[name] for name in ("full", "paper", "quick"))
    lora = [arm for arm in full.pretrained.place_arms if arm.method == "lora"]
    assert {arm.target for arm in lora} == {"attention", "mlp", "all", "all,head"}
    assert {arm.r for arm in lora} == {1, 4, 8, 16, 64}
    for preset in (full, paper, quick):
        assert {"int8", "nf4", "fp32", "bf16"} <= {arm.precision for arm in preset.arms}
        assert {arm.optimizer for arm in preset.arms if arm.method == "full"} >= {"adam", "adam8bit"}
        assert len(preset.seeds) >= 3
        assert preset.shape == "gpt2-medium"
    runs = plan(paper, "demo", pretrained="smollm2")
    source = [run for run in runs if run.group == "source" and run.lr]
    for model, letters in {"demo": {"x"}, "smollm2": {"x", "X"}}.items():
        assert {run.settings.contains for run in source if run.model == model} == letters
        assert {run.lr for run in source if run.model == model} == {1e-6, 1e-5, 1e-4, 1e-3}
    assert {run.settings.steps for run in source if run.settings.contains == "x"} == {300}
    assert len({run.file.lower() for run in runs}) == len(runs)
    assert not [run for run in plan(paper, "demo") if run.model == "smollm2"]


def test_time_left(tmp_path):
    session = Session(Place(tmp_path), ["a", "a", "b"])
    assert session.left() == ""
    session.finished(Job("", "", "", {}, "a"), {"status": "ok", "wall": 10.0})
    assert session.left() == ", about 0:20 left"  # one of a kind that was seen, one of another
    session.finished(Job("", "", "", {}, "b"), {"status": "ok", "wall": 30.0})
    assert session.left() == ", about 0:10 left"
    assert clock(3725) == "1:02:05"
    assert clock(65) == "1:05"


@pytest.mark.parametrize(
    ("call", "status", "error"),
    [("store:provenance", "failed", "positional argument"), ("nowhere:f", "failed", "No module named")],
)
def test_a_call_that_raises_has_a_record(tmp_path, call, status, error):
    record = process.run(Job("a.json", "a", call, {"seed": 3}), Place(tmp_path, worker=None))
    assert record == store.read(tmp_path / "a.json")
    assert (record["status"], record["spec"]) == (status, {"seed": 3})
    assert error in record["error"]
    assert record["hardware"]["threads"] == 1
    assert {"versions", "commit", "dirty", "wall"} <= set(record)
