"""The README does what it says: its commands run, its figures are those of the results, its files exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load
from xfactor_peft.options import LoadOptions, SamplingOptions
from xfactor_peft.tokens.highlight import marked_parts

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(*starts: str) -> list[list[str]]:
    """The words of every line in a fenced block that starts with one of these."""
    lines = [line for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


def started(folder: Path, words: list[str]) -> str:
    """What one command line of this project prints, started in `folder` without a network."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def main_job(tmp_path_factory) -> tuple[Path, str]:
    """`python cli.py train --lora-r 8`, literally, on the demo model; the folder it ran in and what it printed."""
    folder = tmp_path_factory.mktemp("main")
    (words,) = commands("python cli.py train")
    assert words == ["python", "cli.py", "train", "--lora-r", "8"]
    return folder, started(folder, words[2:])


def test_the_main_job_reaches_nine_tenths(main_job):
    folder, output = main_job
    assert output.startswith("model demo (openai-community/gpt2-medium cannot be had: ")
    record = json.loads((folder / "adapters/X-lora-r8/xfactor.json").read_text())
    assert record["before"]["rate"] < 0.01
    assert record["after"]["rate"] >= 0.9
    assert record["loss"]["last"] < 0.2 * record["loss"]["first"]


def test_text_before_and_after(main_job, run, monkeypatch):
    folder, _ = main_job
    (words,) = commands("python cli.py generate")
    monkeypatch.chdir(folder)
    output = run(*words[2:]).output
    assert output.count("base") >= 2
    assert output.count("X-lora-r8 x 1") == 2


def test_the_text_at_the_top_is_what_comes(run, monkeypatch):
    """The base's and the bundled adapter's, to the letter, with the tokens of the set marked."""
    monkeypatch.chdir(ROOT)
    shown = [
        " ".join(line.strip("> ") for line in quote.splitlines()).split("* ", 1) for quote in README.split("\n\n")[3:5]
    ]
    words = ["--adapter", "none", "--adapter", "demo-rate", "--dtype", "fp32", "--json", shown[0][0].strip("*")]
    printed = json.loads(run("generate", *words).stdout)
    for part, (_, text) in zip(printed, shown, strict=True):
        assert part["text"].strip().replace("\n", " ").startswith(text.replace("**", ""))
    bank = AdapterBank(load("demo", LoadOptions(dtype="fp32")), ROOT / "adapters")
    bank.load("demo-rate")
    bank.use("demo-rate")
    ids = bank.generate(shown[0][0].strip("*"), SamplingOptions())
    tokens = [
        part.strip() for part, inside in marked_parts(bank.base.tokenizer, ids, [bank.token_set("demo-rate")]) if inside
    ]
    marked = re.findall(r"\*\*(.*?)\*\*", shown[1][1])
    assert marked == tokens[: len(marked)]


def test_the_wanted_rate_is_that_of_the_results():
    """R after held-out kinds of prompts, the lowest and the highest of them, and the KL, of the head that looks."""
    lines = (ROOT / "benchmarks/results/same_rate/same.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    [row] = [row for row in rows if row[:4] == ["demo", "0.1", "1, 1", "head"]]
    text = " ".join(README.split())
    rate, low, high, kl = re.search(
        r"R = (0\.\d+) .*?, (0\.\d+) to (0\.\d+) by kind, at a KL of (0\.\d+)", text
    ).groups()
    assert (float(rate), float(kl)) == pytest.approx((float(row[6]), float(row[9])), abs=6e-4)
    assert f"{low} {high}" == row[7]


def test_the_real_model_is_in_one_screen():
    """R, loss and memory of full fine-tuning and of LoRA."""
    table = README.split("<!-- headline:begin -->")[1].split("<!-- headline:end -->")[0].strip().splitlines()
    assert all(word in table[0] for word in ("R (95 %)", "loss", "prose", "MiB"))
    assert [line.split("|")[1].split(",")[0].strip() for line in table[2:]] == [
        "base",
        *["full"] * 2,
        *["LoRA r=8"] * 3,
    ]


def test_the_python_block_runs(capsys):
    """As it is printed; without a network, as in all tests, the model is the demo model."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    exec(compile(block, "README", "exec"), {})
    before, after = map(float, capsys.readouterr().out.split())
    assert after > before + 0.3


def test_every_file_of_the_map_exists():
    table = README.split("## Files")[1].split("## ")[0]
    names = re.findall(r"`([\w./]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert len(names) > 10
    folder = ROOT
    for name in names:
        path = ROOT / name if (ROOT / name).exists() else folder / name
        assert path.exists(), name
        folder = path.parent if path.is_file() or "/" in name.rstrip("/") else path


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_tables_are_those_of_the_results():
    words = [sys.executable, ROOT / "benchmarks/readme.py", "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_short():
    assert len(README.splitlines()) <= 120
