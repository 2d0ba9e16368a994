"""The soak's parts in short; over thousands of swaps and steps it is `benchmarks/soak.py`."""

import json

import pytest
import soak
from bench import tiny


def test_the_soak_runs_in_short(tmp_path):
    """Its own limit means nothing after a few steps, so another one is set here."""
    model = tiny.make(tmp_path / "model")
    for name in ("a", "b"):
        tiny.make_adapter(model, tmp_path / name)
    parts = {"swaps": soak.swaps(model, tmp_path, 2), "steps": soak.steps(model, 2)}
    assert [part["count"] for part in parts.values()] == [2, 2]
    assert max(part["growth_mib"] for part in parts.values()) < 64
    with pytest.raises(SystemExit, match="0"):
        tiny.conclude(tmp_path / "soak.json", {"limit": 64}, parts, ok=True)
    record = json.loads((tmp_path / "soak.json").read_text())
    assert (record["status"], record["swaps"], record["settings"]) == ("ok", parts["swaps"], {"limit": 64})


def test_a_leak_is_noticed(monkeypatch):
    memory = iter([400.0] * 5 + [400.0 + leak for leak in range(22)])
    monkeypatch.setattr(soak, "resident_mib", lambda: next(memory))
    monkeypatch.setattr(soak.gc, "collect", lambda: 0)
    monkeypatch.setattr(soak.gc, "get_objects", list)
    watch = soak.Watch(30)
    for index in range(30):
        watch(index)
    assert len(watch.samples) == 27  # without the warm-up
    assert watch.result()["growth_mib"] == 21.0
