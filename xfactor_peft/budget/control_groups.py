"""What Linux's memory control groups leave to this process: containers, batch jobs and services are limited by them.

A limit holds for all that a group and the groups inside it have in memory, the page cache included. Pages of files that
were not used lately are taken back before the limit is felt, so they count as free:

    left = limit - (usage - inactive_file)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_SECOND = "memory.max", "memory.current", "inactive_file"
_FIRST = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
"""By version: the files of the limit and of what is used, and the entry of memory.stat."""


def left_by_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that every limit on this process leaves, those of the groups round its own included; none without a limit.

    Args:
        proc: names the process's group in every hierarchy; inside a container by a path that may be the host's, of
            which only the root is there.
        root: where the hierarchies are mounted: version 2 itself, of version 1 a folder `memory`.
    """
    return [left for group, names in _groups(proc, root) if (left := _left(group, *names)) is not None]


def _groups(proc: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups that may limit memory, from each root to the process's own, and the names of what to read there."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _FIRST) if controllers else (root, _SECOND)
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), names


def _left(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    """What a group leaves; None where it is not there or has no limit."""
    try:
        most, used = (int((group / name).read_text()) for name in (limit, usage))
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, most - used + _entry(group / "memory.stat", inactive))


def _entry(stat: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines()).get(name, 0))
    except (OSError, ValueError):
        return 0
