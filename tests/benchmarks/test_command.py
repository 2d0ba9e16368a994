"""Memory of other processes, read from outside and limited."""

from __future__ import annotations

import signal
import subprocess
import sys

import plan_accuracy
import pytest
from bench.command import NoGroup, family, memory_group, memory_of
from bench.configurations import configurations

FILL = "x = bytearray({} << 20); print('done', flush=True); input()"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_process_and_its_children_is_read_from_outside():
    shell = ["sh", "-c", f'{sys.executable} -c "{FILL.format(80)}"; true']
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        found = [memory_of(pid) for pid in family(process.pid)]
        process.stdin.write("\n")
        process.stdin.close()
    assert len(found) == 2
    assert 80 <= max(high for high, _ in found) / 1024 < 120
    assert max(private for _, private in found) >= 80 * 1024
    assert memory_of(process.pid) == (0, 0), "it is gone"


def test_a_group_ends_what_needs_more_than_its_limit():
    try:
        with memory_group(64) as procs:
            ends = [
                subprocess.run(
                    [sys.executable, "-c", FILL.format(size)], input="\n", text=True, capture_output=True, check=False,
                    preexec_fn=lambda: procs.write_text("0"),
                ).returncode
                for size in (16, 160)
            ]  # fmt: skip
    except NoGroup as reason:
        pytest.skip(str(reason))
    assert ends == [0, -signal.SIGKILL]
    assert not procs.parent.exists()


def test_forty_configurations_and_what_is_said_of_them():
    every = configurations()
    assert len(every) == 40
    good = {"name": "a", "status": "ok", "predicted": 98.0, "peak": 100.0, "error": -0.02, "highest": "training"}
    bad = {"name": "b", "status": "failed", "peak": 50.0}
    text = plan_accuracy.table([{**good, "limited": {"status": "killed: out of memory", "limit": 103}}, bad])
    assert "1 configurations: median error 2.0%, largest 2.0%; within 1.05 x the plan 0 of 1 ran to their end" in text
    assert "| b |" in text
    assert "failed" in text
