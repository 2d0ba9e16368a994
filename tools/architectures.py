"""Write the table of architectures into docs/models.md: what holds of each, from a tiny model with random weights.

    python tools/architectures.py             # all of them, about a minute
    python tools/architectures.py llama rwkv  # print the rows of some

The exit status is 1 when one neither holds nor is refused.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.architectures import ARCHITECTURES, Row, architecture_folder, examine

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- architectures: written by tools/architectures.py -->", "<!-- end of architectures -->"
HEAD = (
    "| architecture | fp32 logits | 8 and 4 bit: layers | trained LoRA layers | left as they are |",
    "|---|---|---|---|---|",
)


def table(rows: Sequence[Row]) -> str:
    """Rows of the page, in the order of their names."""
    return "\n".join([*HEAD, *(_line(row) for row in sorted(rows, key=lambda row: row.name))])


def _line(row: Row) -> str:
    if row.refusal:
        return f"| {row.name} | refused | | | {_plain(row.refusal)} |"
    quantised = "refused" if row.refused_quantised else str(row.quantised)
    without = f"no LoRA: {row.without_lora}" if row.without_lora else ""
    bits = f"not quantised: {row.left}" if row.left else _plain(row.refused_quantised)
    same = "bit-equal" if row.logits else "DIFFERENT"
    left = "; ".join(part for part in (without, bits) if part)
    verdict = "" if row.holds else "**WRONG** "
    return f"| {row.name} | {verdict}{same} | {quantised} | {row.moved} of {row.trained} | {left} |"


def _plain(text: str) -> str:
    """A message without the folder that it names."""
    return re.sub(r"/\S+/", "", text).replace("|", "/")


def main(names: Sequence[str]) -> int:
    """Examine and print, and write the page when all were examined; returns the exit status."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name in names or ARCHITECTURES:
            rows.append(examine(name, architecture_folder(name, Path(root) / name)))
            print(_line(rows[-1]), flush=True)
    if not names:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        PAGE.write_text(f"{before}{START}\n{table(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
