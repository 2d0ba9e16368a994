"""What memory control groups leave: made-up trees of both versions, in the layout of /proc and /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from xfactor_peft.budget import memory_model
from xfactor_peft.budget.control_groups import left_by_groups

MIB = 2**20
UNLIMITED = 9223372036854771712
"""What version 1 says in place of "max"."""


def group(folder: Path, limit: object, used: int, inactive: int = 0) -> None:
    """A control group of version 2, or below a folder `memory` of version 1."""
    first = "memory" in folder.parts
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    own, whole = (1, inactive) if first else (inactive, inactive)  # version 1 counts the groups inside apart
    total = f"total_inactive_file {whole}\n" if first else ""
    (folder / "memory.stat").write_text(f"anon {used - inactive}\ninactive_file {own}\nactive_file 5\n{total}")


@pytest.fixture
def left(tmp_path):
    """A function: what the tree in tmp_path / "fs" leaves to a process with these lines in its /proc/self/cgroup."""

    def found(*lines: str) -> list[int]:
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        return left_by_groups(tmp_path / "cgroup", tmp_path / "fs")

    return found


def test_the_tightest_of_nested_groups_counts(tmp_path, left):
    """As of Slurm and systemd: the limit is of a group in between, or of the innermost."""
    job = tmp_path / "fs/system.slice/job_7"
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/memory.stat").write_text("inactive_file 99\n")  # the root has no limit's file
    group(job.parent, "max", 900 * MIB)
    group(job, 1000 * MIB, 400 * MIB)
    group(job / "step_0", "max", 300 * MIB)
    assert left("0::/system.slice/job_7/step_0") == [600 * MIB]
    group(job / "step_0", 500 * MIB, 300 * MIB)
    assert min(left("0::/system.slice/job_7/step_0")) == 200 * MIB
    group(job, 1000 * MIB, 1100 * MIB)
    assert min(left("0::/system.slice/job_7/step_0")) == 0


def test_pages_of_files_not_used_lately_are_free(tmp_path, left):
    group(tmp_path / "fs", 1000 * MIB, 950 * MIB, inactive=700 * MIB)
    assert left("0::/") == [750 * MIB]
    (tmp_path / "fs/memory.stat").unlink()
    assert left("0::/") == [50 * MIB]


def test_the_first_version_has_a_hierarchy_of_its_own(tmp_path, left):
    """Beside a second one without memory; and in a container, where the host's path is not there."""
    lines = ("9:cpu,cpuacct:/elsewhere", "4:hugetlb,memory:/docker/7f", "1:name=systemd:/docker/7f", "0::/docker/7f")
    memory = tmp_path / "fs/memory"
    group(memory, UNLIMITED, 3000 * MIB)
    group(memory / "docker/7f", 1000 * MIB, 900 * MIB, inactive=500 * MIB)
    assert min(left(*lines)) == 600 * MIB
    group(memory, 800 * MIB, 300 * MIB)
    assert min(left("4:memory:/docker/of-the-host")) == 500 * MIB


def test_without_a_limit_there_is_none(tmp_path, left):
    group(tmp_path / "fs/user.slice", "max", 100 * MIB)
    assert left("0::/user.slice") == left("0::/") == left("3:cpu:/user.slice") == []
    assert left_by_groups(tmp_path / "none", tmp_path / "fs") == []


def test_free_memory_is_within_the_limits(monkeypatch):
    for limits, expected in (([], 7 * MIB), ([9 * MIB], 7 * MIB), ([5 * MIB, 3 * MIB], 3 * MIB)):
        monkeypatch.setattr(memory_model, "left_by_groups", lambda limits=limits: limits)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 7 * MIB}))
        assert memory_model.free_memory(torch.device("cpu")) == expected
