"""From results to tables, report.html, and the pages; the figures are made up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from statistics import mean

import pytest
import readme
from bench import store
from bench.stats import over_seeds
from bench.tables import number, with_interval
from bench.training import arms
from bench.training.metrics import peak, steps_to_rate
from bench.training.pages import all_tables
from bench.training.plan import RUNS, Run, plan
from bench.training.presets import Preset, Settings
from bench.training.report import html, write_report
from bench.training.results import load
from bench.training.runner import CHECKS
from click.testing import CliRunner

from tests.benchmarks.bench_stub import PROVENANCE, checks, record
from xfactor_peft.errors import XFactorError

PRESET = Preset(
    "test",
    (arms.FULL, arms.LORA_INT8),
    Settings(steps=20, probe_every=5),
    source=Settings(contains="x"),
    shape_arms=(arms.FULL, arms.LORA_INT8),
)
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
FAILED = {"status": "out of memory", "error": "the process was killed"}


def make(folder, change=lambda run, record: record):
    """A finished benchmark; `change` may alter a record or leave it out by returning None."""
    runs = plan(PRESET, "demo")
    for run in runs:
        made = change(run, record(run))
        if made is not None:
            store.write(folder / RUNS / run.file, made)
    manifest = {"preset": "test", "model": "demo", "real_weights": None, "real_weights_note": "no network"}
    store.write(folder / "benchmark.json", {**manifest, "files": [run.file for run in runs], **PROVENANCE})
    store.write(folder / CHECKS, checks("demo"))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "out")


def fail_shape_full(run: Run, record: dict) -> dict:
    if run.group == "shape" and run.arm == arms.FULL:
        return {**FAILED, "label": run.label, "spec": run.spec(), **PROVENANCE}
    return record


class Page(HTMLParser):
    """Collects what a browser would fetch, and the text of every mark."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.tags, self.marks, self._in_mark = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._in_mark = tag == "mark"
        for name, value in attributes:
            if name in ("src", "srcset", "href", "data", "poster", "action", "xlink:href"):
                self.fetched.append(value)

    def handle_data(self, data):
        if self._in_mark:
            self.marks.append(data)
            self._in_mark = False


def test_intervals_over_seeds():
    three = over_seeds([1.0, 2.0, 3.0])
    assert three.mean == 2.0
    assert three.high - three.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert over_seeds([0.0, 2.0]).high == pytest.approx(1 + 12.7062, rel=1e-5)
    assert over_seeds([0.5], (0.4, 0.7)).low == 0.4
    assert over_seeds([0.5]).high == 0.5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.93151, "0.932"),
        (1.5, "1.50"),
        (31.25, "31.2"),
        (8092.4, "8,092"),
        (-1e-9, "0.000"),
        (2.5e7, "25 million"),
        (8.24e6, "8.2 million"),
        (2.8e8, "280 million"),
        (7e9, "7 billion"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_intervals_stay_within_what_is_possible():
    assert with_interval(over_seeds([0.99, 1.0, 0.95]), 1).endswith("–1.000)")
    assert with_interval(over_seeds([0.99, 1.0, 0.95])).endswith("–1.05)")
    assert with_interval(over_seeds([0.5, 0.5])) == "0.500"
    assert with_interval(None) == "–"


def test_tables_hold_means_over_seeds(folder):
    results = load(folder)
    text, cost = (all_tables(results)[name] for name in ("text", "shape-gpt2-medium-shape"))
    assert [row[0] for row in text.rows] == ["base, not trained", "full, fp32", "LoRA r=8, attention + MLP, 8-bit"]
    rates = [
        store.read(folder / "runs" / f"demo-train-full-fp32-seed{seed}.json")["scores"]["rate"] for seed in (0, 1, 2)
    ]
    assert text.rows[1][1].startswith(number(mean(rates)) + " (")
    column = text.headers.index("floor")
    assert [row[column] for row in text.rows] == ["–", "0.000", "0.250"]
    assert text.rows[1][text.headers.index("steps to R ≥ 0.9")] == "10"
    assert cost.rows[0][cost.headers.index("train peak, MiB")] == "1,000"


def test_only_peaks_of_fresh_processes_count():
    record = {"fresh_process": False, "train_peak": {"rss_mib": 5.0}}
    assert peak("train_peak")(record) is None
    assert peak("train_peak")({**record, "fresh_process": True}) == 5.0
    assert peak("train_peak")({"train_peak": {"rss_mib": 5.0}}) == 5.0
    assert peak("train_peak")({"fresh_process": True, "train_peak": {"rss_mib": 5.0, "cuda_mib": 9.0}}) == 9.0
    assert steps_to_rate({"probes": [[5, 0.2], [10, 0.91], [15, 0.99]]}) == 10
    assert steps_to_rate({"probes": [[5, 0.2]]}) is None


def test_a_failed_arm_keeps_its_row(tmp_path):
    results = load(make(tmp_path / "out", fail_shape_full))
    table = all_tables(results)["shape-gpt2-medium-shape"]
    assert table.rows[0][:2] == ["full, fp32", "out of memory: the process was killed"]
    assert table.failed == {0}
    assert "out of memory: the process was killed" in table.markdown()
    assert "1 run did not finish" in html(results)


def test_an_arm_with_one_failed_seed_says_so(tmp_path):
    def change(run, record):
        return {**record, **FAILED} if run.group == "train" and run.seed == 1 and run.arm == arms.FULL else record

    row = all_tables(load(make(tmp_path / "out", change)))["text"].rows[1]
    assert row[0] == "full, fp32 [1 failed: the process was killed]"
    assert row[-1] == "2"


def test_the_report_is_one_file_that_fetches_nothing(folder):
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [value for value in page.fetched if value.startswith("#")] == ["#source", "#text", "#cost", "#how"]
    assert all(value.startswith(("data:", "#")) for value in page.fetched)
    assert not re.search(r"url\(|@import", text)
    assert "link" not in page.tags
    assert "script" not in page.tags  # a sample holds one, as text
    assert page.tags.count("img") >= 4
    assert {file.name for file in (folder / "plots").iterdir()} == {
        "loss.png", "rate-kl.png", "forgetting.png", "memory-time-gpt2-medium.png", "source-loss.png",
    }  # fmt: skip


def test_the_page_test_would_notice_a_request():
    """Negative control."""
    assert Page('<img src="https://example.org/a.png"><mark>X</mark>').fetched == ["https://example.org/a.png"]


def test_samples_are_marked_and_escaped(folder):
    text = html(load(folder))
    assert set(Page(text).marks) == {"XX"}
    assert "Once &lt;upon&gt;" in text
    assert "<blockquote><b>Once &lt;upon&gt;</b> <mark>XX</mark> &amp; &lt;script&gt;" in text  # no space is marked


def test_equal_results_give_an_equal_page(folder):
    assert html(load(folder)) == html(load(folder))


def test_missing_real_weights_are_said_to_be_missing(folder):
    manifest = store.read(folder / "benchmark.json")
    store.write(folder / "benchmark.json", {**manifest, "preset": "paper"})
    assert "GPT-2 Medium’s real weights could not be had" in html(load(folder))


def test_runs_that_the_preset_no_longer_has_are_left_out(folder):
    manifest = store.read(folder / "benchmark.json")
    files = [name for name in manifest["files"] if "-shape-" not in name]
    store.write(folder / "benchmark.json", {**manifest, "files": files})
    assert not [name for name in all_tables(load(folder)) if name.startswith("shape")]


def publish(results, page, *words):
    return CliRunner().invoke(readme.main, ["--results", str(results), "--page", str(page), *words])


def test_tables_and_figures_are_made_and_whatever_is_stale_is_named(tmp_path):
    """A page, a table, a report, a figure that is another one, and one that is gone; then a changed record."""
    folder, page = make(tmp_path / "benchmarks" / "results" / "paper"), tmp_path / "page.md"
    manifest = store.read(folder / "benchmark.json")
    files = [name for name in manifest["files"] if "-source-" in name]  # one figure
    store.write(folder / "benchmark.json", {**manifest, "files": files})
    page.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    assert "page.md, paper/" in publish(folder.parent, page, "--check").output
    assert publish(folder.parent, page).exit_code == 0
    assert publish(folder.parent, page, "--check").exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# before\n\n" + BEGIN)
    assert text.endswith(END + "\n\nafter\n")
    assert "\nold\n" not in text
    assert "| full, fp32, lr 0.0001 | " in text
    assert 'benchmarks/results/paper/plots/source-loss.png"' in text

    page.write_text(text.replace("full, fp32", "full, fp64", 1), encoding="utf-8")
    for file in (folder / "report.html", folder / "plots" / "source-loss.png"):
        file.write_bytes(file.read_bytes() + b"0")
    (folder / "table.md").unlink()
    output = publish(folder.parent, page, "--check").output
    assert all(name in output for name in ("page.md", "report.html", "source-loss.png", "table.md"))
    assert publish(folder.parent, page).exit_code == 0
    assert page.read_text(encoding="utf-8") == text

    file = folder / "runs" / "demo-source-full-fp32-adamw-lr0.0001-seed0.json"
    record = store.read(file)
    store.write(file, {**record, "scores": {**record["scores"], "distinct_2": 0.123}})
    assert "page.md, paper/" in publish(folder.parent, page, "--check").output


@pytest.mark.parametrize("text", ["", "<!-- benchmark:begin -->", "<!-- benchmark:end --> <!-- benchmark:begin -->"])
def test_a_readme_without_markers_is_left_alone(text):
    with pytest.raises(XFactorError, match="benchmark:begin"):
        readme.pasted(text, "new", "benchmark")
