"""The benchmark of memory: both stacks learn the same, and a table is printed only when they do."""

from __future__ import annotations

from dataclasses import asdict, replace

import click
import memory
import pytest
from bench import process
from bench.memory.arms import ARMS, PARITY, REFERENCE
from bench.memory.measure import measure
from bench.memory.table import render, summarise
from bench.process import Place

from tests.tiny import tiny_tokenizer
from tools.make_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(tokenizer)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", tokenizer=tokenizer)


def run_here(arm, checkpoint, steps):
    return measure({"arm": asdict(arm), "steps": steps}, lambda step, loss: None, str(checkpoint))


def test_both_stacks_follow_fp32(checkpoint):
    """Same seed, same inputs: bf16 and 8 bits of ours, and the usual 8 bits, stay near plain fp32 LoRA."""
    reference = run_here(REFERENCE, checkpoint, 6)["losses"]
    assert reference[-1] < reference[0]
    worst = 0.0
    for arm, most in {**PARITY, next(a for a in ARMS if a.name == "plain 8-bit"): 0.02}.items():
        losses = run_here(arm, checkpoint, 6)["losses"]
        assert losses == pytest.approx(reference, rel=most)
        assert losses != reference
        worst = max(worst, *(abs(a - b) for a, b in zip(losses, reference, strict=True)))
    full = run_here(replace(REFERENCE, method="full"), checkpoint, 6)["losses"]
    assert full[0] == pytest.approx(reference[0], rel=1e-6)
    assert abs(full[-1] - reference[-1]) > 3 * worst, "a stack that learns otherwise would be noticed"


def test_decoding_is_timed_by_the_token(checkpoint):
    arm = next(arm for arm in ARMS if arm.decode and arm.stack == "ours")
    assert len(run_here(arm, checkpoint, 3)["seconds"]) == 50


def test_no_table_without_parity(monkeypatch, tmp_path):
    def losses(value):
        def run(job, place):
            return {"status": "ok", "losses": [4.0] if job.label == REFERENCE.name else [value]}

        monkeypatch.setattr(process, "run", run)

    losses(4.2)
    with pytest.raises(click.ClickException, match="no figure is worth printing"):
        memory.check_parity(Place(tmp_path), 1)
    losses(4.01)
    assert list(memory.check_parity(Place(tmp_path), 1).values()) == pytest.approx([0.0025, 0.0025])


def test_the_table_names_what_was_missed_and_what_failed():
    arms = {arm.name: arm for arm in ARMS}
    peaks = {"8-bit": 1400.0, "plain 8-bit": 2900.0}
    runs = {
        name: [{"arm": {}, "load_peak": 900.0, "train_peak": peak, "seconds": [9, 9, 1.0 if name == "8-bit" else 2.0]}]
        for name, peak in peaks.items()
    }
    runs["4-bit, checkpointing"] = [{"arm": {}, "error": "killed by signal 9"}]
    record = {
        "rows": summarise(runs),
        "parity": {"8-bit": 0.001},
        "rounds": 1,
        "hardware": {"cpu": "a CPU", "cores": 2},
    }
    text = render(record)
    assert f"| 8-bit | 1,400 (wanted ≤ {arms['8-bit'].most_mib:,}) | 900 | 1.000 | 0.50 |" in text
    assert "| 4-bit, checkpointing | failed: killed by signal 9 |" in text
