"""An adapter for phrases in its folder, with the record from which it can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.output import hashes, record_head, save_adapter, staged, write_record
from ..lowmem.memory import peaks
from .page import write_page
from .train import PhraseResult

PAGE = "before-after.html"


def phrase_record(result: PhraseResult) -> dict[str, Any]:
    """Everything but the weights, JSON-serialisable."""
    solved = result.solved
    goals = [
        {
            **goal.record(),
            "base_per_token": float(solved.base[g]),
            "wanted_per_token": float(solved.wanted[g]),
            "strength": max(-99.0, float(solved.strengths[g])),
        }
        for g, goal in enumerate(result.target.goals)
    ]
    return {
        "kind": "phrases",
        "goals": goals,
        "options": result.options.record(),
        "tokens": result.tokens,
        "proof": {"banned": len(result.proof.banned), "checked": result.proof.checked} if result.proof else None,
        "rounds": result.rounds,
        "before": result.before.record() if result.before else None,
        "after": result.after.record() if result.after else None,
        "risen": [list(row) for row in result.risen],
        "seconds": round(result.seconds, 1),
        "peak": peaks(result.base.device),
    }


def save_phrases(
    result: PhraseResult,
    output: Path,
    *,
    force: bool = False,
    rules: dict[str, Any] | None = None,
    reference: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Write the adapter, its record and the page; returns the record.

    Args:
        rules: what the run was asked for, as a rule file says it.
        reference: rates per 1,000 words of every pattern in a text of people's.

    Raises:
        XFactorError: `output` exists and `force` is off, or cannot be written.
    """
    with staged(output, force=force) as staging:
        record = {
            **record_head(output.name, "lora"),
            "base": result.base.record(),
            "phrases": phrase_record(result),
            "rules": rules,
            "lora": {"r": result.options.r, "trunk_r": result.options.trunk_r},
        }
        save_adapter(result.model, staging, result.base.choice.name, result.base.choice.revision)
        if result.before and result.after:
            write_page(staging / PAGE, result, output.name, reference)
        record["sha256"] = hashes(staging)
        write_record(staging, record)
    return record
