"""The source's table for the README: its rates, and how the text of each begins, with set tokens in bold."""

from __future__ import annotations

import re
from typing import Any

from .results import Results, Row
from .tables import SOURCE_TABLE, all_tables

PAGE = "source.md"
LETTERS = 150


def source_page(results: Results) -> str | None:
    """Tables and beginnings of samples as Markdown; None without the source's runs."""
    tables = [table for name, table in all_tables(results).items() if name.startswith(SOURCE_TABLE)]
    if not tables:
        return None
    rows = [row for row in results.of("source") if row.good and row.good[0]["samples"]]
    parts = [f"{table.caption}\n\n{table.markdown()}" for table in tables]
    if rows:
        prompt = rows[0].good[0]["samples"][0]["prompt"]
        lines = "\n".join(f"- {row.label}: {beginning(row)}" for row in rows)
        parts.append(f"“{prompt}” goes on, top-k 50, set tokens in bold:\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def beginning(row: Row, letters: int = LETTERS) -> str:
    """The first letters of a row's sample."""
    text, left = "", letters
    pieces: list[list[Any]] = row.good[0]["samples"][0]["pieces"]
    for piece, inside in pieces:
        words, left = escaped(" ".join(piece[:left].split())), left - len(piece)
        space = " " if piece[:1].isspace() and text else ""
        text += space + (f"**{words}**" if inside and words else words)
        if left <= 0:
            break
    return text + " …"


def escaped(text: str) -> str:
    return re.sub(r"([\\*_`<|#])", r"\\\1", text)
