"""The literal command in a process of its own, measured from outside, in a memory control group where asked for.

The peak is the highest VmHWM of the process and of those it starts, read every 10 ms, since a run resets its own
between its phases. A control group counts the page cache, too, and allows no swap.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .store import REPOSITORY, Record

GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
MIB = 2**20


class NoGroup(Exception):
    """No memory control group can be made here; says why."""


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of `limit` MiB without swap: the file that a process joins it by.

    Raises:
        NoGroup: the system has none, or this user may not make one.
    """
    old = (GROUPS[0] / "memory.limit_in_bytes").exists()
    first = "memory.limit_in_bytes" if old else "memory.max"
    group = GROUPS[not old] / f"xfactor-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        (group / first).write_text(str(limit * MIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise NoGroup(f"no memory control group can be made here: {error}") from error
    with contextlib.suppress(OSError):
        (group / ("memory.swappiness" if old else "memory.swap.max")).write_text("0")
    try:
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """VmHWM and RssAnon in KiB; zeros for a process that is gone."""
    found = {"VmHWM": 0, "RssAnon": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0])
    return found["VmHWM"], found["RssAnon"]


def train(words: list[str], threads: int, procs: Path | None = None, *, keep: Path | None = None) -> Record:
    """Run `cli.py train` with these words, or another command that they begin with, in an empty folder.

    The adapter stays in `keep`, if that is given. Returns its peak and highest RssAnon (MiB), wall time (s), how it
    ended, and what it wrote down of itself.
    """
    join = None if procs is None else lambda: procs.write_text("0")  # 0: the process that writes
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        output = keep.resolve() if keep else Path(folder) / "out"
        verb = ["train"] if words[0].startswith("-") else []
        command = [sys.executable, str(REPOSITORY / "cli.py"), *verb, *words, "--output", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        started, peak, anonymous = time.perf_counter(), 0, 0
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=join
        )
        while process.poll() is None:
            for high, private in map(memory_of, family(process.pid)):
                peak, anonymous = max(peak, high), max(anonymous, private)
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()]
        record = json.loads((output / "xfactor.json").read_text()) if (output / "xfactor.json").is_file() else {}
    status = "ok" if process.returncode == 0 else "failed"
    if process.returncode == -signal.SIGKILL:
        status = "killed: out of memory"
    made = {
        "status": status, "peak": round(peak / 1024, 1), "anonymous": round(anonymous / 1024, 1),
        "seconds": round(seconds, 1), "record": record,
    }  # fmt: skip
    return made if status == "ok" else {**made, "log": [line.replace(f"{REPOSITORY}/", "") for line in lines[-10:]]}
