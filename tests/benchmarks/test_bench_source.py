"""The source's table for the README, from made-up figures."""

from dataclasses import replace

import pytest
from bench.training.arms import LORA_FP32
from bench.training.pages import beginning, headline, table_page
from bench.training.plan import RUNS
from bench.training.report import REPORT, TABLE, write_report
from bench.training.results import load

from tests.benchmarks.test_bench_report import make


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "out")


def test_the_page_has_every_rate_and_how_its_text_begins(folder):
    write_report(folder)
    page = (folder / TABLE).read_text(encoding="utf-8")
    assert page == table_page(load(folder))
    for rate in ("1e-06", "0.0001"):
        assert f"| full, fp32, lr {rate} | 8.0" in page
    for rate in ("1e-06", "1e-05", "0.0001", "0.001"):
        assert f"| LoRA r=8, attention + MLP, fp32, lr {rate} |" in page
    assert page.count("- full, fp32, lr") == 2
    assert "- base, not trained: **XX** & \\<script>alert(1)\\</script> …" in page


def test_only_the_beginning_is_shown(folder):
    row = load(folder).of("source")[0]
    assert beginning(row, 6) == "**XX** & …"


def test_without_the_source_there_is_no_table_of_it(folder):
    results = load(folder)
    rows = tuple(row for row in results.rows if row.group != "source")
    assert "source" not in table_page(replace(results, rows=rows))


def test_what_is_planned_and_not_run_is_said(folder):
    (folder / RUNS / "demo-train-full-fp32-seed0.json").unlink()
    write_report(folder)
    assert "Not run yet: demo-train-full-fp32." in (folder / TABLE).read_text(encoding="utf-8")
    assert "Planned and not run yet" in (folder / REPORT).read_text(encoding="utf-8")


def test_the_readme_has_a_screen_of_the_real_model_alone(folder):
    """Untrained, full at both rates, LoRA at its two highest, and what the set head adds; nothing of the demo model."""
    results = load(folder)
    assert headline(results) is None
    real = [replace(row, model="smollm2", contains="x") for row in results.of("source")]
    source = real[-1]
    head = replace(source, group="places", arm=replace(LORA_FP32, target="all,head"))
    table = headline(replace(results, rows=(*results.rows, *real, head)))
    assert [line[0] for line in table.rows] == [
        "base, not trained",
        "full, lr 1e-06",
        "full, lr 0.0001",
        "LoRA r=8, attention + MLP, lr 0.0001",
        "LoRA r=8, attention + MLP, lr 0.001",
        f"LoRA r=8, attention + MLP + set head, {source.settings['steps']} steps",
    ]
    assert headline(replace(results, rows=(*results.rows, *real))) is None  # without the head it would say half
