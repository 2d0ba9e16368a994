"""The results in benchmarks/results, whichever version wrote them, give the pages that lie beside them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from bench.memory import table as memory
from bench.rate import table as rate
from bench.store import REPOSITORY, RESULTS, read_all
from bench.training.pages import source_page, table_page
from bench.training.results import load


def page(file: str) -> str:
    return (RESULTS / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_full_fine_tuning_against_lora(preset):
    assert table_page(load(RESULTS / preset)) == page(f"{preset}/table.md")


def test_the_source():
    assert source_page(load(RESULTS / "paper")) == page("paper/source.md")


def test_memory():
    assert memory.stored(RESULTS / "lowmem") == page("lowmem/table.md")


def test_rates(tmp_path: Path):
    for file in (RESULTS / "rate").glob("*.json"):
        (tmp_path / file.name).symlink_to(file)
    rate.report(tmp_path)
    assert (tmp_path / "rate-kl.png").stat().st_size > 20_000
    for name in ("table.md", "logit-bias.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == page(f"rate/{name}")


@pytest.mark.parametrize(("name", "kind"), [("logits", "kl"), ("rates", "rates"), ("whole", "run")])
def test_gguf_files_here_and_in_llama_cpp(name, kind):
    """The tables beside the results, and the same in docs/gguf.md."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    module = importlib.import_module(f"bench.packed.{name}")
    records = [record for record in read_all(RESULTS / "gguf") if kind in record]
    assert records
    table = module.table(records)
    assert table + "\n" == page(f"gguf/{name}.md")
    assert table in (REPOSITORY / "docs" / "gguf.md").read_text(encoding="utf-8")
