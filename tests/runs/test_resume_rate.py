"""A run for a rate that was stopped in any of its phases goes on and ends with the same bytes."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import SafetensorError

from tests.runs.crashing import Crash, metrics, scores, stop_at_the_second, weights
from tests.training.uniform import QUICK
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.checkpoint.checkpointer import Checkpointer, NoCheckpoints
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.checkpoint.interruption import Interrupted
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import TiltedTarget
from xfactor_peft.options import LoraOptions, ObjectiveOptions, RateOptions, Recipe, TrainOptions
from xfactor_peft.runs import folder as folder_module
from xfactor_peft.runs import run as run_module
from xfactor_peft.runs.folder import interrupted_settings
from xfactor_peft.runs.run import FolderOptions, train_to_folder
from xfactor_peft.sampling import calibration, own_samples
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training import phases, rate_head, rate_report
from xfactor_peft.training.rate import RateRun
from xfactor_peft.training.run import TrainingRun
from xfactor_peft.training.sequence import phase as sequence_phase
from xfactor_peft.training.sequence.state import SequenceState

OPTIONS = TrainOptions(steps=12, batch_size=2, seq_len=16)
BLOCKS = {"lora": LoraOptions(r=2, target="attention", dropout=0.2)}
PLANNED = {"lora": LoraOptions(r=2, target="all,head"), "sequence": True}
CONSTANT = {"rate": RateOptions("on-average"), "dial": True}
CASES = {
    "head": {}, "constant": CONSTANT, "attention": BLOCKS, "planned": PLANNED,
    "planned without a head": {"sequence": True, **BLOCKS},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def short():
    """Calibration from few short texts: the same code, in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_samples, "TEXTS", 16)
        patch.setattr(calibration, "ROUNDS", (8, 16))
        patch.setattr(own_samples, "LENGTH", 16)
        patch.setattr(sequence_phase, "CHECK_TEXTS", 8)
        patch.setattr(rate_head, "TEXTS", (4, 4, 8))
        yield


@pytest.fixture(scope="module")
def whole(short, load_tiny, tmp_path_factory):
    """A function: the folder of one of `CASES` that was never stopped, made once; to be asked for before patching."""
    root = tmp_path_factory.mktemp("whole")

    def folder(case):
        if not (root / case).exists():
            run(load_tiny(), root / case, **CASES[case])
        return root / case

    return folder


def run(base, output, sequence=False, dial=False, rate=RateOptions(), crash_at=None, **more):
    def on_step(step):
        if step.step == crash_at:
            raise Crash

    tokens = TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    planning = {"sequence_level": True, "sequence_steps": 6} if sequence else {}
    objective = ObjectiveOptions(dial=dial, frontier=False, rate=rate, **planning)
    folder = FolderOptions(save_every=4, resume=more.pop("resume", False))
    recipe = Recipe(OPTIONS, evaluation=QUICK, objective=objective, **more)
    return train_to_folder(base, TiltedTarget.of(tokens, 0.2), output, recipe, folder, on_step=on_step)


def report(folder):
    """What is recorded of how the rate was reached, without the times."""
    rate = json.loads((folder / "xfactor.json").read_text())["rate"]
    steps = (rate["sequence"] or {"steps": []})["steps"]
    return {**rate, "sequence": [{k: v for k, v in step.items() if k != "seconds"} for step in steps]}


def assert_same(folder, whole):
    assert weights(folder) == weights(whole)
    assert metrics(folder) == metrics(whole)
    assert scores(folder) == scores(whole)
    assert report(folder) == report(whole)


@pytest.mark.parametrize(
    ("case", "crashes", "phase"),
    [
        ("attention", (2, 6, 10), ["solved", "distil", "distil"]),  # lambda moves at steps 4, 6 and 9
        ("planned", (0, 3, 5), ["solved", "sequence", "sequence"]),
        ("planned without a head", (7, 12, 14), ["distil", "distil", "sequence"]),
    ],
    ids=["attention", "planned", "planned without a head"],
)
def test_a_resumed_run_is_bit_identical(load_tiny, whole, tmp_path, case, crashes, phase):
    more, expected = CASES[case], whole(case)
    found = []
    for count, step in enumerate(crashes):
        with pytest.raises(Crash):
            run(load_tiny(), tmp_path / "a", crash_at=step, resume=count > 0, **more)
        found.append(Checkpoints(tmp_path / ".a.partial/checkpoints").latest().facts["phase"])
        torch.manual_seed(99)  # the other process's random numbers are anywhere
    assert found == phase
    run(load_tiny(), tmp_path / "a", resume=True, **more)
    assert_same(tmp_path / "a", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_solved_strength_is_not_solved_again(load_tiny, whole, tmp_path, monkeypatch):
    expected = whole("attention")
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "a", crash_at=0, **BLOCKS)
    monkeypatch.setattr(phases.Solve, "_solved", lambda *_: pytest.fail("solved again"))
    run(load_tiny(), tmp_path / "a", resume=True, **BLOCKS)
    assert_same(tmp_path / "a", expected)


def test_a_fitted_head_is_not_fitted_again(load_tiny, whole, tmp_path, monkeypatch):
    expected = whole("head")

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(phases.Distil, "run", crash)
        with pytest.raises(Crash):
            run(load_tiny(), tmp_path / "a")
    monkeypatch.setattr(phases, "fit_head", lambda *_, **__: pytest.fail("fitted again"))
    run(load_tiny(), tmp_path / "a", resume=True)
    assert_same(tmp_path / "a", expected)


@pytest.mark.parametrize("case", ["head", "attention"])
def test_stopped_while_lambda_is_sought_no_sample_is_lost(load_tiny, whole, tmp_path, monkeypatch, case):
    expected, drawn, made = whole(case), RateRun.drawn, []

    def watched(self, name, draw):
        def counted():
            made.append(name)
            if made == [*made[:2], name] and self.run.hooks.checkpointer.start is None:
                signal.raise_signal(signal.SIGTERM)
            return draw()

        return drawn(self, name, counted)

    monkeypatch.setattr(RateRun, "drawn", watched)
    with pytest.raises(Interrupted, match="step 0 is saved; resume with `resume=True`"):
        run(load_tiny(), tmp_path / "a", **CASES[case])
    assert len(made) == 3
    run(load_tiny(), tmp_path / "a", resume=True, **CASES[case])
    assert made[3] == made[2]  # the sample that was stopped is the first to be drawn again
    assert not {*made[:2]} & {*made[3:]}
    assert_same(tmp_path / "a", expected)


@pytest.fixture
def failing(monkeypatch):
    """A function: the `count`-th call of `owner.name`, and no other, raises `error`."""

    def fail(owner, name, error, count=2):
        plain, calls = getattr(owner, name), []

        def counted(*arguments):
            calls.append(arguments)
            if len(calls) == count:
                raise error
            return plain(*arguments)

        monkeypatch.setattr(owner, name, counted)

    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("case", ["head", "attention"])
@pytest.mark.parametrize(
    ("place", "said"),
    [((torch, "save", FULL), "No space left"), ((RateRun, "drawn", MemoryError()), "out of memory")],
    ids=["disk", "memory"],
)
def test_without_room_the_rounds_before_stay(load_tiny, whole, failing, tmp_path, case, place, said):
    expected = whole(case)
    failing(*place)
    with pytest.raises(XFactorError, match=rf"{said}.*is of step 0"):
        run(load_tiny(), tmp_path / "a", **CASES[case])
    assert len([*(tmp_path / ".a.partial/checkpoints").iterdir()]) == 1
    run(load_tiny(), tmp_path / "a", resume=True, **CASES[case])
    assert_same(tmp_path / "a", expected)


@pytest.mark.parametrize("error", [FULL, SafetensorError(FULL.strerror)])
def test_an_adapter_that_found_no_room_is_resumed(load_tiny, whole, failing, tmp_path, error):
    expected = whole("head")
    failing(folder_module, "save_result", error, 1)
    with pytest.raises(XFactorError, match=r"cannot be written \(No space left.*; what there is stays in"):
        run(load_tiny(), tmp_path / "a")
    run(load_tiny(), tmp_path / "a", resume=True)
    assert_same(tmp_path / "a", expected)


def test_what_cannot_be_reached_leaves_nothing(load_tiny, failing, tmp_path):
    """The control: rounds are saved, and resuming would fail again."""
    failing(RateRun, "drawn", XFactorError("no tilt has these rates"))
    with pytest.raises(XFactorError, match="no tilt"):
        run(load_tiny(), tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_without_its_state_planning_differs(load_tiny, whole, tmp_path, monkeypatch):
    """The control: every part of the state is needed."""
    expected = whole("planned")
    with pytest.raises(Crash):
        run(load_tiny(), tmp_path / "crashed", crash_at=3, **PLANNED)
    restore = SequenceState.restore
    for forgotten in ("integral", "optimizer", "value_optimizer", "random"):

        def forgetful(self, tensors, facts, forgotten=forgotten):
            restore(self, tensors, facts)
            if forgotten == "random":
                torch.manual_seed(1)
            elif forgotten == "integral":
                self._trainer.controller.integral = self._trainer.controller.integral + 0.5
            else:
                for moments in getattr(self._trainer, forgotten).state.values():
                    moments["exp_avg"].zero_()

        monkeypatch.setattr(SequenceState, "restore", forgetful)
        shutil.copytree(tmp_path / ".crashed.partial", tmp_path / f".{forgotten}.partial")
        run(load_tiny(), tmp_path / forgotten, resume=True, **PLANNED)
        assert report(tmp_path / forgotten)["sequence"] != report(expected)["sequence"]


def test_ctrl_c_waits_for_the_batch_and_saves(load_tiny, whole, tmp_path, monkeypatch):
    expected = whole("planned")
    after = Checkpointer.after_step

    def press(self, state, **more):
        if len(state.history) == 3 and self.start is None:
            self._interruption.requested = signal.SIGINT
        after(self, state, **more)

    monkeypatch.setattr(Checkpointer, "after_step", press)
    with pytest.raises(Interrupted, match="stopped and saved after step 3; resume with `resume=True`"):
        run(load_tiny(), tmp_path / "a", **PLANNED)
    run(load_tiny(), tmp_path / "a", resume=True, **PLANNED)
    assert_same(tmp_path / "a", expected)


@pytest.mark.parametrize("case", ["head", "attention"])
def test_stopped_while_it_is_measured_the_adapter_is_there(load_tiny, whole, tmp_path, monkeypatch, case):
    """The weights of a whole run, and a record that lacks what was to be measured, until the run is resumed."""
    expected = whole(case)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "measure", stop_at_the_second(TrainingRun.measure))
        with pytest.raises(Interrupted, match=r"the adapter is whole in .*; resume with"):
            run(load_tiny(), tmp_path / "a", **CASES[case])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert weights(tmp_path / "a") == weights(expected)
    record = json.loads((tmp_path / "a/xfactor.json").read_text())
    assert (record["after"], record["before"] is None) == (None, False)
    assert report(tmp_path / "a") == report(expected)  # neither has a dial
    read_adapter(tmp_path / "a")
    run(load_tiny(), tmp_path / "a", resume=True, **CASES[case])
    assert_same(tmp_path / "a", expected)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in expected.iterdir()}
    with pytest.raises(XFactorError, match="the run is finished"):
        interrupted_settings(tmp_path / "a")


def test_the_dial_of_a_tilt_rests_on_the_same_texts(load_tiny, whole, tmp_path, monkeypatch):
    """Those that lambda was sought on, of which a run that resumes after that draws none."""
    expected = whole("constant")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "measure", stop_at_the_second(TrainingRun.measure))
        with pytest.raises(Interrupted, match="the adapter is whole"):
            run(load_tiny(), tmp_path / "a", **CONSTANT)
    run(load_tiny(), tmp_path / "a", resume=True, **CONSTANT)
    assert len(report(expected)["dial"]) == len(rate_report.DIAL_SCALES)
    assert_same(tmp_path / "a", expected)


def test_a_run_that_saves_nothing_offers_no_resuming(load_tiny, tmp_path, monkeypatch):
    """As with `fsdp`: what is published stays where it is."""
    monkeypatch.setattr(run_module, "Checkpointer", lambda *_: NoCheckpoints())
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "measure", stop_at_the_second(TrainingRun.measure))
        with pytest.raises(Interrupted, match=r"the adapter is whole in .*; start again with `force=True` for them"):
            run(load_tiny(), tmp_path / "a", **CASES["head"])
    read_adapter(tmp_path / "a")
    with pytest.raises(XFactorError, match="there is nothing to resume"):
        interrupted_settings(tmp_path / "a")
    read_adapter(tmp_path / "a")
