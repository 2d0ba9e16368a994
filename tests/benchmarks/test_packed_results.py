"""The tables of GGUF files are those of the records they stand beside."""

from __future__ import annotations

import importlib

import pytest
from bench.store import REPOSITORY, RESULTS, read_all


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("logits", "kl"),
        ("rates", "rates"),
        ("decoding", "decoding"),
        ("whole", "run"),
    ],
)
def test_gguf_files_here_and_in_llama_cpp(name, kind):
    """The tables beside the results, and the same in docs/gguf.md."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    module = importlib.import_module(f"bench.packed.{name}")
    records = [record for record in read_all(RESULTS / "gguf") if kind in record]
    assert records
    table = module.table(records)
    assert table + "\n" == (RESULTS / "gguf" / f"{name}.md").read_text(encoding="utf-8")
    assert table in (REPOSITORY / "docs" / "gguf.md").read_text(encoding="utf-8")
