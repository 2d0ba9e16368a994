"""The merged model as an ordinary transformers folder."""

from __future__ import annotations

from pathlib import Path

from ..adapters.files import RECORD, WEIGHTS, write_json
from ..adapters.mix import Mix
from ..adapters.output import hashes, staged
from ..bank.bank import AdapterBank
from ..bank.merging import merge


def write_folder(bank: AdapterBank, mix: Mix, output: Path, *, force: bool) -> str:
    """Merge, and save model, tokenizer and a record of where it came from; embeddings stay tied where they were.

    Raises:
        XFactorError: `output` holds something else, or the adapter cannot be merged.
    """
    with staged(output, force=force) as staging:
        notes: list[str] = []
        model = merge(bank, mix, tell=notes.append)
        model.save_pretrained(staging)
        bank.base.tokenizer.save_pretrained(staging)
        parts = [
            {"name": name, "weight": weight, "sha256": bank.adapters[name].section("sha256").get(WEIGHTS)}
            for name, weight in mix.parts
        ]
        record = {
            "format": 1,
            "kind": "merged",
            "merged_from": parts,
            "base": bank.base.record(),
            "sha256": hashes(staging),
        }
        write_json(staging / RECORD, record)
    tied = "tied to the input embedding" if model.config.tie_word_embeddings else "a tensor of its own"
    return "; ".join([f"merged {mix} into {output}", f"the output embedding is {tied}", *notes])
