"""The preset smoke on a tiny model: every arm in this process, and the script as a user would call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import store
from bench.process import Place
from bench.training import runner
from bench.training.__main__ import main
from bench.training.pages import all_tables
from bench.training.plan import RUNS
from bench.training.presets import SMOKE
from bench.training.results import load
from click.testing import CliRunner

from tests.tiny import tiny_model_folder
from tools.make_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(results, model): a run of the preset without processes of its own, but with their worker's code."""
    root, threads = tmp_path_factory.mktemp("smoke"), torch.get_num_threads()
    model = tiny_model_folder("gpt2", root / "model")
    shape = {"tiny-shape": str(write_checkpoint(root / "shape", "tiny", tokenizer=model))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "made_models", lambda *_: shape)
        runner.run_preset(SMOKE, Place(root / "out", worker=None), str(model))
    torch.set_num_threads(threads)
    return root / "out", model


def test_every_arm_leaves_a_record(smoke):
    records = store.read_all(smoke[0] / RUNS)
    assert [record["error"] for record in records if record["status"] != "ok"] == []
    assert len(records) == 1 + 2 + 4 + 3 + 2
    for record in records:
        assert record["versions"]["torch"]
        assert record["hardware"]["threads"] == 1
        assert "spec" in record


def test_arms_learn_and_cost_what_they_should(smoke):
    results = load(smoke[0])
    full, lora = results.of("train")
    assert full.estimate("loss_last").mean < 0.2 * full.estimate("loss_first").mean
    assert lora.estimate("loss_last").mean < 0.5 * lora.estimate("loss_first").mean
    assert lora.estimate("trainable").mean < 0.2 * full.estimate("trainable").mean
    assert lora.estimate("train_peak").mean > 50
    assert {"source-0", "text", "shape-tiny-shape"} <= set(all_tables(results))


def test_the_script_checks_in_a_fresh_process_and_keeps_what_is_done(smoke):
    folder, model = smoke
    before = {file: file.stat().st_mtime_ns for file in (folder / RUNS).iterdir()}
    (folder / "checks.json").unlink()  # the same commit's, which would be kept
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ["bash", ROOT / "benchmarks/run.sh", "--preset", "smoke", "--model", model, "--output", folder]
    done = subprocess.run([*words, "--threads", "1"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "correctness checks passed; 12 runs are done, 0 to go" in done.stdout
    assert {"table.md", "report.html", "plots", "logs", "checks.json"} <= {file.name for file in folder.iterdir()}
    assert before == {file: file.stat().st_mtime_ns for file in (folder / RUNS).iterdir()}


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    words = ["--preset", "smoke", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: .*no such folder.*\n", done.output)
