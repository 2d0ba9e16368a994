"""The whole script, `benchmarks/run.sh --preset smoke`, on a tiny model, as a user would call it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench import store
from benchmarks.bench.results import load
from benchmarks.bench.tables import all_tables
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]


def script(output: Path, model: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "run.sh"), "--preset", "smoke", "--model", str(model)]
    command += ["--output", str(output), "--threads", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    root = tmp_path_factory.mktemp("smoke")
    model = tiny_model_folder("gpt2", root / "model")
    return root / "out", model, script(root / "out", model)


def test_the_script_makes_everything(smoke):
    folder, _, done = smoke
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"table.md", "report.html", "plots", "runs", "checks.json"} <= {file.name for file in folder.iterdir()}
    records = store.read_all(folder)
    assert [record["error"] for record in records if record["status"] != "ok"] == []
    assert len(records) == 1 + 2 + 4 + 3 + 2
    assert "about" in done.stdout  # the time left


def test_arms_learn_and_cost_what_they_should(smoke):
    results = load(smoke[0])
    full, lora = results.of("train")
    assert full.estimate("loss_last").mean < 0.2 * full.estimate("loss_first").mean
    assert lora.estimate("loss_last").mean < 0.5 * lora.estimate("loss_first").mean
    assert lora.estimate("trainable").mean < 0.2 * full.estimate("trainable").mean
    assert lora.estimate("train_peak").mean > 50
    assert {"text", "cost", "shape"} < set(all_tables(results))
    for record in store.read_all(smoke[0]):
        assert record["versions"]["torch"]
        assert record["hardware"]["threads"] == 1
        assert "spec" in record


def test_report_only_trains_nothing(smoke):
    folder, model, _ = smoke
    before = {file: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    (folder / "report.html").unlink()
    done = script(folder, model, "--report-only")
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").is_file()
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    done = script(tmp_path / "out", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
