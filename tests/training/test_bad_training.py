"""Training that cannot go well stops, says at which step and what to do, and keeps what was good."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.runs.crashing import OPTIONS, Crash, metrics, run, weights
from tests.training.uniform import QUICK, x_target
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.budget.out_of_memory import is_out_of_memory
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.cli import main
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.objectives import UniformObjective
from xfactor_peft.objective.targets import Goal
from xfactor_peft.options import LoraOptions, SamplingOptions, TrainOptions
from xfactor_peft.sampling.generation import generate
from xfactor_peft.training import loop
from xfactor_peft.training.train import train

ROOT = Path(__file__).parents[2]
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def spoil_loss(monkeypatch, step, value):
    """Make the objective's loss `value` at one step."""
    plain, calls = UniformObjective.forward, []

    def forward(self, ids):
        calls.append(1)
        result = plain(self, ids)
        return type(result)(result.loss * value, result.set_mass) if len(calls) == step + 1 else result

    monkeypatch.setattr(UniformObjective, "forward", forward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(load_tiny, tmp_path, monkeypatch, value):
    spoil_loss(monkeypatch, 7, value)
    with pytest.raises(XFactorError, match=r"step 7: loss .*lower `lr`.*the last good checkpoint is of step 5, in "):
        run(load_tiny(), tmp_path / "a")
    found = Checkpoints(tmp_path / ".a.partial/checkpoints").latest()
    assert found.step == 5
    assert all(torch.isfinite(tensor).all() for tensor in found.state()["model"].values())
    assert all(math.isfinite(value) for row in found.state()["history"] for value in row)
    monkeypatch.undo()
    run(load_tiny(), tmp_path / "whole")
    run(load_tiny(), tmp_path / "a", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(load_tiny, tmp_path, monkeypatch):
    """Gradients that are finite, and a step that is not: seen when the checkpoint is made."""
    plain = loop._check_step

    def spoil(made, *rest):
        plain(made, *rest)
        if made.step == 9:
            with torch.no_grad():
                next(p for n, p in base.model.named_parameters() if "lora_A" in n).fill_(math.inf)

    base = load_tiny()
    monkeypatch.setattr(loop, "_check_step", spoil)
    with pytest.raises(XFactorError, match=r"step 9: .*lora_A.* is no longer finite; lower `lr`"):
        run(base, tmp_path / "a")
    assert Checkpoints(tmp_path / ".a.partial/checkpoints").latest().step == 5


def test_gradients_that_are_all_zero(tiny, monkeypatch):
    spoil_loss(monkeypatch, 0, 0.0)
    with pytest.raises(XFactorError, match="step 0: every gradient is 0"):
        train(tiny, x_target(tiny), OPTIONS, evaluation=QUICK)


def test_lora_that_does_not_move(tiny, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: None)
    with pytest.raises(XFactorError, match="LoRA's B is still 0 after the first step"):
        train(tiny, x_target(tiny), OPTIONS, evaluation=QUICK)


def starve(monkeypatch, rows, error):
    """Memory for at most so many sequences at once."""
    plain, seen = UniformObjective.forward, []

    def forward(self, ids):
        seen.append(len(ids))
        if len(ids) > rows:
            raise error
        return plain(self, ids)

    monkeypatch.setattr(UniformObjective, "forward", forward)
    return seen


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
def test_out_of_memory_says_what_would_fit(tiny, monkeypatch, error):
    starve(monkeypatch, 3, error)
    with pytest.raises(
        XFactorError, match=r"out of memory at step 0: 8 x 64 tokens, .* MiB free now; try `checkpointing=on`"
    ) as caught:
        train(tiny, x_target(tiny), TrainOptions(steps=2, batch_size=8, seq_len=64), evaluation=QUICK)
    assert "`auto_batch=True`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_it(tiny, monkeypatch):
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    starve(monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny, x_target(tiny), TrainOptions(steps=1, seq_len=8, auto_batch=True), evaluation=QUICK)


def test_auto_batch_takes_the_same_steps_in_smaller_parts(load_tiny, monkeypatch):
    options = TrainOptions(steps=6, batch_size=7, seq_len=8, lr=1e-3, grad_accum=2, auto_batch=True)
    base = load_tiny()
    whole = train(base, x_target(base), options, evaluation=QUICK)
    seen = starve(monkeypatch, 2, CPU)
    base = load_tiny()
    parts = train(base, x_target(base), options, evaluation=QUICK)
    assert seen[:3] == [7, 3, 1]
    assert set(seen[2:]) == {1}
    for one, other in zip(whole.history, parts.history, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)


def test_auto_batch_ends_at_one_sequence(tiny, monkeypatch):
    starve(monkeypatch, 0, CPU)
    with pytest.raises(XFactorError, match="out of memory at step 0: 1 x 8 tokens"):
        train(tiny, x_target(tiny), TrainOptions(steps=1, seq_len=8, auto_batch=True), evaluation=QUICK)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_rates_outside_of_the_range(tiny, rate):
    with pytest.raises(XFactorError, match=r"`goal.rate` must be at least 0 and below 1"):
        Goal(x_target(tiny).tokens, rate=rate)


def test_prompts_of_any_kind(tiny):
    options = SamplingOptions(max_new_tokens=4)
    for prompt in ("", "☃ \U0001f9ca", "\x00\n\t", "العربية"):
        assert len(generate(tiny.model, tiny.tokenizer, prompt, options)) <= 4
    with pytest.raises(XFactorError, match="exceed the model's context of 128"):
        generate(tiny.model, tiny.tokenizer, "a b c " * 200, options)


HOLD = """
import sys
from pathlib import Path

from xfactor_peft.checkpoint.locks import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_folder(load_tiny, tmp_path):
    """The second is refused while the first is there, by any process; afterwards, and after a kill, it is not."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "a"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(XFactorError, match=rf"another run \(process {other.pid}\) is writing .*a; wait for it"):
        run(load_tiny(), tmp_path / "a")
    run(load_tiny(), tmp_path / "b")
    other.kill()
    other.communicate()
    run(load_tiny(), tmp_path / "a")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_same_seed_same_bytes_and_the_seed_is_recorded(load_tiny, tmp_path):
    lora = LoraOptions(r=4, dropout=0.2)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = TrainOptions(steps=5, seq_len=8, seed=seed)
        result, record = run(load_tiny(), tmp_path / name, options=options, lora=lora)
        assert record["train"]["seed"] == seed
        (tmp_path / f"{name}.txt").write_text("".join(result.after.samples))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text() != ""
    assert read_adapter(tmp_path / "a").record["after"] == read_adapter(tmp_path / "b").record["after"]
    kept = load_file(tmp_path / "a/adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in kept.items() if "lora_B" in name)


def test_a_crash_between_publishing_and_tidying_up_is_put_right(load_tiny, tmp_path):
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=7)
    left = shutil.copytree(tmp_path / ".a.partial/checkpoints", tmp_path / "left")
    run(load_tiny(), tmp_path / "a", resume=True)
    shutil.move(left, tmp_path / "a/checkpoints")
    result = CliRunner().invoke(main, ["train", "--resume", str(tmp_path / "a")])
    assert (result.exit_code, "the run is finished" in result.output) == (2, True)
    assert not Path(tmp_path / "a/checkpoints").exists()
