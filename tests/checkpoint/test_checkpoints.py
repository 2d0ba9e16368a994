"""Checkpoints by themselves: torn, damaged and hostile ones; and when a signal is heard."""

from __future__ import annotations

import os
import pickle
import signal
import time
from functools import partial

import pytest
import torch

from xfactor_peft.checkpoint import checkpoints
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.checkpoint.durable import write_atomically
from xfactor_peft.checkpoint.interruption import Interrupted, Interruption


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    """Cut at any byte, with any bit flipped, or missing: the one before it is used; with both damaged, none is."""
    folder = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        folder.save(step, {"a": torch.full((5,), float(step))}, {"n": step})
    assert sorted(p.name.split(".")[0] for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    (path,) = tmp_path.glob("step-00000003.*")
    whole = path.read_bytes()
    variants = [whole[:cut] for cut in range(len(whole))]
    variants += [bytes([*whole[:at], whole[at] ^ 1 << at % 8, *whole[at + 1 :]]) for at in range(len(whole))]
    for content in variants:
        path.write_bytes(content)
        found = Checkpoints(tmp_path).latest()
        assert found is not None
        assert (found.step, found.facts["n"], float(found.state()["a"][0])) == (2, 2, 2.0)
    path.unlink()
    assert Checkpoints(tmp_path).latest().step == 2
    path.write_bytes(whole)
    assert Checkpoints(tmp_path).latest().step == 3
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    empty = Checkpoints(tmp_path)
    assert empty.latest() is None
    assert len(empty.damaged) == 2


def test_a_checkpoint_saved_again_replaces_the_damaged_one(tmp_path):
    folder = Checkpoints(tmp_path)
    for step in (1, 2):
        folder.save(step, {}, {"n": step})
    (path,) = tmp_path.glob("step-00000002.*")
    path.write_bytes(b"")
    assert folder.latest().step == 1
    folder.save(2, {}, {"n": 3})
    assert folder.latest().facts["n"] == 3
    assert [p.name.split(".")[0] for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    assert not path.exists()


class Payload:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path(__import__('os').environ['PAYLOAD']).write_text('it ran')",)


def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    """With a name that is right, in every place of a checkpoint, as torch's format or as a bare pickle."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    for place in ("format", "step", "facts", "state", None):
        content = {"format": checkpoints.FORMAT, "step": 9, "facts": {}, "state": {}, place: Payload()}
        for save in (torch.save, pickle.dump):
            folder = tmp_path / f"{place}-{save.__module__}"
            folder.mkdir()
            write_atomically(folder / "step-00000009.pt", partial(save, content), hashed=True)
            found = Checkpoints(folder)
            assert found.latest() is None
            assert len(found.damaged) == 1
    assert not (tmp_path / "ran").exists()


def test_signals_wait_for_the_step_and_a_second_one_does_not():
    def strike(number):
        os.kill(os.getpid(), number)
        time.sleep(0.05)

    with Interruption() as interruption, interruption.deferred():
        strike(signal.SIGTERM)
        assert interruption.requested == signal.SIGTERM
        with pytest.raises(Interrupted):
            strike(signal.SIGINT)
    with Interruption(), pytest.raises(Interrupted) as caught:
        strike(signal.SIGTERM)
    assert caught.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
