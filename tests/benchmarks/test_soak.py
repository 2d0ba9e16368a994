"""Memory stays flat over swaps and steps; the script that says so notices a leak."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from soak import Watch  # noqa: E402

LIMIT = 8.0


def test_memory_is_flat_over_swaps_and_steps(tmp_path):
    """A tenth of docs/reliability.md's soak."""
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--swaps", "100", "--steps", "300", "--limit", str(LIMIT)]
    done = subprocess.run(
        [*command, "--json", tmp_path / "soak.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (result["swaps"]["count"], result["steps"]["count"]) == (100, 300)
    assert max(part["growth_mib"] for part in result.values()) <= LIMIT


def test_a_leak_is_noticed():
    watch, kept = Watch(30), []
    for index in range(30):
        kept.append(bytearray(b"x" * 2**19))
        watch(index)
    assert watch.result(0)["growth_mib"] > LIMIT
    assert len(watch.samples) == 27
