"""A run that was stopped anywhere goes on and ends with the same bytes; what is not whole is never loaded."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs.crashing import Crash, metrics, run, scores, stop_at_the_second, weights
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import LoraOptions, ObjectiveOptions, TrainOptions

ROOT = Path(__file__).parents[2]
CASES = {
    "adam": {},
    "adamw": {"options": TrainOptions(steps=12, batch_size=2, seq_len=8, optimizer="adamw", weight_decay=0.1)},
    "adafactor": {"options": TrainOptions(steps=12, batch_size=2, seq_len=8, optimizer="adafactor")},
    "adam8bit": {"options": TrainOptions(steps=12, batch_size=2, seq_len=8, optimizer="adam8bit"),
                 "lora": LoraOptions(r=64)},
    "accumulation": {"options": TrainOptions(steps=12, batch_size=2, seq_len=8, grad_accum=3)},
    "dropout": {"lora": LoraOptions(r=2, dropout=0.3)},
    "own contexts": {"objective": ObjectiveOptions(contexts="self", kl_to_base=0.5), "lora": LoraOptions(dropout=0.1)},
    "full": {"options": TrainOptions(method="full", steps=12, batch_size=2, seq_len=8)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical(load_tiny, tmp_path, case):
    """Killed at step 7, its newest checkpoint is of step 5; killed again at 9; then it ends as if nothing had been."""
    run(load_tiny(), tmp_path / "whole", **CASES[case])
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7, **CASES[case])
    assert [line.get("step") for line in metrics(tmp_path / ".a.partial")[1:]] == list(range(8))
    torch.manual_seed(99)  # the other process's random numbers are anywhere
    torch.rand(7)
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=9, resume=True, **CASES[case])
    _, record = run(load_tiny(), tmp_path / "a", resume=True, **CASES[case])
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")
    assert scores(tmp_path / "a") == scores(tmp_path / "whole")
    assert record["name"] == "a"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "whole"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_without_its_state_a_resumed_run_differs(load_tiny, tmp_path, monkeypatch):
    """The control: a restore that forgets the optimiser's moments ends with other bytes."""
    from xfactor_peft.checkpoint.state import TrainingState

    run(load_tiny(), tmp_path / "whole")
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7)
    restore = TrainingState.restore

    def forgetful(self, state, facts):
        restore(self, state, facts)
        for moments in self.optimizer.state.values():
            moments["exp_avg"].zero_()

    monkeypatch.setattr(TrainingState, "restore", forgetful)
    run(load_tiny(), tmp_path / "a", resume=True)
    assert weights(tmp_path / "a") != weights(tmp_path / "whole")


def test_an_interrupted_run_is_not_overwritten_unasked(load_tiny, tmp_path):
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7)
    with pytest.raises(XFactorError, match="at step 5; resume it with `resume=True`, or start again"):
        run(load_tiny(), tmp_path / "a")
    run(load_tiny(), tmp_path / "a", force=True)
    assert len(metrics(tmp_path / "a")) == 13


def test_resuming_replaces_only_what_the_run_was_told_to(load_tiny, tmp_path):
    run(load_tiny(), tmp_path / "a")
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7, force=True)
    os.replace(tmp_path / "a", tmp_path / "b")
    os.replace(tmp_path / "b", tmp_path / "a")  # another one, for all that the run can know
    kept = metrics(tmp_path / "a")
    with pytest.raises(XFactorError, match=r"came after the run in .* give it another name first"):
        run(load_tiny(), tmp_path / "a", resume=True)
    assert metrics(tmp_path / "a") == kept
    os.replace(tmp_path / "a", tmp_path / "b")
    run(load_tiny(), tmp_path / "a", resume=True)
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "b", crash_at=7, force=True)
    run(load_tiny(), tmp_path / "b", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_run_without_a_checkpoint_starts_again(load_tiny, tmp_path):
    run(load_tiny(), tmp_path / "whole")
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=3)
    run(load_tiny(), tmp_path / "a", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")


def test_other_arguments_are_refused(load_tiny, tmp_path):
    with pytest.raises(XFactorError, match="there is no interrupted run"):
        run(load_tiny(), tmp_path / "a", resume=True)
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7)
    other = TrainOptions(steps=12, batch_size=2, seq_len=9, lr=2e-2)
    with pytest.raises(XFactorError, match=r"another train \(lr, seq_len\)"):
        run(load_tiny(), tmp_path / "a", options=other, resume=True)
    with pytest.raises(XFactorError, match=r"another base \("):
        run(load_tiny("llama"), tmp_path / "a", resume=True)


def test_contexts_that_changed_are_noticed(load_tiny, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a small house in the forest. " * 20)
    more = {"objective": ObjectiveOptions(contexts=str(text))}
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7, **more)
    text.write_text("The box of wax was next to the taxi, and six foxes sat on it. " * 20)
    with pytest.raises(XFactorError, match="the contexts are not those"):
        run(load_tiny(), tmp_path / "a", resume=True, **more)


def test_a_full_disk_keeps_the_checkpoint_before(load_tiny, tmp_path, monkeypatch):
    run(load_tiny(), tmp_path / "whole")
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        XFactorError, match=r"step 10 cannot be written .*No space left.*the last whole one is of step 5"
    ):
        run(load_tiny(), tmp_path / "a")
    (left,) = (tmp_path / ".a.partial/checkpoints").iterdir()
    assert left.name.startswith("step-00000005.")
    run(load_tiny(), tmp_path / "a", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")


def test_a_write_that_the_system_refuses(load_tiny, tmp_path):
    """No stand-in: the kernel ends every file at 32 KiB, and then it does not any more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    base = load_tiny()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
        with pytest.raises(XFactorError, match="the checkpoint of step 5 cannot be written") as caught:
            run(base, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(caught.value)
    assert "no checkpoint is there yet" in str(caught.value)
    assert not list((tmp_path / ".a.partial/checkpoints").glob("*"))
    run(load_tiny(), tmp_path / "a", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(tiny_folders, tmp_path, number, status):
    """The whole command line: stopped by a signal, then the command that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [
        sys.executable, ROOT / "cli.py", "train", "--model", tiny_folders["gpt2"], "--dtype", "fp32", "--seq-len", "8",
        "--steps", "3000", "--save-every", "0", "--eval-tokens", "4", "--eval-repeats", "1", "--output", "runs/a b",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith("stopped and saved after step ")
    assert message.endswith("; resume with xfactor train --resume 'runs/a b'")
    assert "Traceback" not in errors
    made = int(message.split("step ")[1].split(";")[0])
    found = Checkpoints(tmp_path / "runs/.a b.partial/checkpoints").latest()
    assert found.step == made < 3000


def test_resume_on_the_command_line(tiny_folders, tmp_path, monkeypatch):
    """The options come back from the run, and it ends as a run that was never stopped."""
    from click.testing import CliRunner

    from xfactor_peft.checkpoint.checkpointer import Checkpointer
    from xfactor_peft.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", str(tiny_folders["gpt2"]), "--dtype", "fp32", "--seq-len", "8", "--steps", "9",
             "--save-every", "4", "--eval-tokens", "4", "--eval-repeats", "1", "--lora-r", "2"]  # fmt: skip
    assert CliRunner().invoke(main, [*words, "--output", "whole"]).exit_code == 0
    after = Checkpointer.after_step

    def stop_at_6(self, state, *, last):
        if len(state.history) == 6 and self.start is None:
            self._interruption.requested = signal.SIGINT
        after(self, state, last=last)

    monkeypatch.setattr(Checkpointer, "after_step", stop_at_6)
    stopped = CliRunner().invoke(main, [*words, "--output", "a"])
    assert stopped.exit_code == 130
    assert "stopped and saved after step 6; resume with xfactor train --resume a" in stopped.output
    for mistake, text in ((["a", "--steps", "4"], "drop --steps"), (["none"], "there is no interrupted run")):
        refused = CliRunner().invoke(main, ["train", "--resume", *mistake])
        assert (refused.exit_code, text in refused.output) == (2, True), refused.output
    resumed = CliRunner().invoke(main, ["train", "--resume", "a"])
    assert resumed.exit_code == 0, resumed.output
    assert weights(Path("a")) == weights(Path("whole"))
    assert metrics(Path("a")) == metrics(Path("whole"))
    again = CliRunner().invoke(main, ["train", "--resume", "a"])
    assert (again.exit_code, "the run is finished" in again.output) == (2, True)


def test_a_published_adapter_stays_when_resuming_is_refused(tiny_folders, load_tiny, tmp_path, monkeypatch):
    """Only its scores are missing: whatever is wrong with the attempt, the adapter keeps its name."""
    from click.testing import CliRunner

    from xfactor_peft.adapters.adapter import read_adapter
    from xfactor_peft.cli import main
    from xfactor_peft.training.run import TrainingRun

    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", str(tiny_folders["gpt2"]), "--dtype", "fp32", "--seq-len", "8", "--steps", "2",
             "--eval-tokens", "4", "--eval-repeats", "1", "--output", "a"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "measure", stop_at_the_second(TrainingRun.measure))
        stopped = CliRunner().invoke(main, words)
    assert "the adapter is whole in a, its scores are not; resume with xfactor train --resume a" in stopped.output
    settings = Path("a/settings.json")
    kept = settings.read_text()
    settings.write_text(json.dumps({name: value for name, value in json.loads(kept).items() if name != "beta"}))
    refused = CliRunner().invoke(main, ["train", "--resume", "a"])
    assert (refused.exit_code, "begun by another version" in refused.output) == (2, True)
    read_adapter(Path("a"))
    with pytest.raises(XFactorError, match="the run has another train"):
        run(load_tiny(), Path("a"), resume=True)
    read_adapter(Path("a"))
    settings.write_text(kept)
    assert CliRunner().invoke(main, ["train", "--resume", "a"]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert json.loads(Path("a/xfactor.json").read_text())["after"]


def test_killed_at_random_moments_nothing_is_lost():
    """The script of docs/reliability.md with a handful of kills."""
    script = [sys.executable, ROOT / "benchmarks/kill_and_resume.py", "--kills", "5", "--steps", "20", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "'kills': 5" in result.stdout
