"""What mutation testing found: `mutmut run` makes and tests the mutants, this counts them and shows the survivors.

    python tools/mutation.py --json benchmarks/results/reliability/mutation.json

A mutant is killed when a test fails, crashes or runs out of time. Survivors that no test could tell from the original
are listed with the reason in `mutation_equivalents.json`, by the changed line. They count as survivors all the same:

    share = killed / mutants,       share_without_equivalents = killed / (mutants - equivalents)

Exit status 1 when a module's share is below `--least`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.json")
KILLED = ("killed", "timeout", "segfault")
COUNTS = ("mutants", "killed", "timeouts", "survived", "equivalent")

Change = tuple[str, str, str]
"""Module, the lines that a mutant takes away, and those that it puts in their place."""


def change_of(module: str, mutant: str) -> Change:
    lines = get_diff_for_mutant(mutant, path=module).splitlines()
    before, after = ("\n".join(x[1:].strip() for x in lines if x[:1] == sign != x[1:2]) for sign in "-+")
    return module, before, after


def count(module: str, equivalents: set[Change]) -> tuple[dict[str, int], list[Change]]:
    """The counts of a module, and its survivors."""
    data = SourceFileMutationData(path=Path(module))
    data.load()
    statuses = {mutant: status_by_exit_code[code] for mutant, code in data.exit_code_by_key.items()}
    if not statuses or "not checked" in statuses.values():
        raise SystemExit(f"not every mutant of {module} was run; finish `mutmut run` first")
    survivors = [change_of(module, mutant) for mutant, status in statuses.items() if status not in KILLED]
    timeouts = sum(status == "timeout" for status in statuses.values())
    equal = sum(survivor in equivalents for survivor in survivors)
    numbers = (len(statuses), len(statuses) - len(survivors), timeouts, len(survivors), equal)
    return dict(zip(COUNTS, numbers, strict=True)), survivors


def shares(counts: dict[str, int]) -> dict[str, float]:
    mutants, killed = counts["mutants"], counts["killed"]
    return {
        "share": round(killed / mutants, 4),
        "share_without_equivalents": round(killed / (mutants - counts["equivalent"]), 4),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts and the survivors there")
    parser.add_argument("--least", type=float, default=0.85, help="the share that every module must reach")
    options = parser.parse_args(arguments)

    listed = {(e["module"], e["before"], e["after"]): e["reason"] for e in json.loads(EQUIVALENTS.read_text())}
    counted = {str(path): count(str(path), set(listed)) for path in sorted(walk_mutatable_files())}
    modules = {name: counts for name, (counts, _) in counted.items()}
    modules["all"] = {name: sum(counts[name] for counts in modules.values()) for name in COUNTS}
    survivors = [survivor for _, found in counted.values() for survivor in found]

    for module, before, after in survivors:
        if (module, before, after) not in listed:
            print(f"{module}\n  - {before}\n  + {after}\n")
    for module, _, after in set(listed) - set(survivors):
        print(f"no survivor any more, to be dropped from {EQUIVALENTS.name}: {module}: {after}\n")
    print(f"{'module':34}", *(f"{name:>10}" for name in COUNTS), "  share  without equivalents")
    for name, counts in modules.items():
        share, rest = shares(counts).values()
        print(f"{name:34}", *(f"{counts[key]:10}" for key in COUNTS), f"{share:7.1%} {rest:20.1%}")

    if options.json:
        fields = ("module", "before", "after")
        named = {s: dict(zip(fields, s, strict=True)) for s in survivors}
        result = {
            "tool": f"mutmut {version('mutmut')}",
            "modules": {name: {**counts, **shares(counts)} for name, counts in modules.items()},
            "equivalents": [{**change, "reason": listed[s]} for s, change in named.items() if s in listed],
            "other_survivors": [change for s, change in named.items() if s not in listed],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(min(shares(counts)["share"] for counts in modules.values()) < options.least)


if __name__ == "__main__":
    sys.exit(main())
