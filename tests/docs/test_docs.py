"""The commands and the Python of the documentation, run exactly as they are printed, in a folder with what is shipped.

A block without a language holds commands; those that begin with `xfactor` (or `echo ... | xfactor`) are run in order,
and so is every block of Python. What is indented by four spaces needs a network, hours or another machine, and is not.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHIPPED = ("demo-X", "demo-Z", "demo-plain", "demo-rate")
PACKAGES = {"export.md": ["gguf"], "trainer.md": ["tensorboard"]}
"""Optional packages that a page needs."""
MINUTES = {"export.md", "low-memory.md", "phrases.md", "target-rate.md", "tutorial.md"}
"""Pages of ten seconds to minutes, since they do what a user would: run by `make docs`, left out of the quick suite."""


@pytest.fixture
def checkout(run, tmp_path):
    """An empty folder with the adapters of a clean checkout, as the working directory."""
    for name in SHIPPED:
        shutil.copytree(ROOT / "adapters" / name, tmp_path / "adapters" / name)
    return tmp_path


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(standard input, words) of every line that starts this program."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        before, _, last = line.rpartition(" | ") if line.startswith("echo ") else ("", "", line)
        words = shlex.split(last, comments=True)
        if words[:1] == ["xfactor"]:
            found.append((" ".join(shlex.split(before)[1:]) + "\n", words[1:]))
    return found


RUNNABLE = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if (page.name not in MINUTES or os.environ.get("XFACTOR_ALL_DOCS"))
    and any(language == "python" or (not language and commands(text)) for language, text in blocks(page))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_a_page_does_what_it_prints(page, checkout, run, capsys):
    for package in PACKAGES.get(page.name, []):
        pytest.importorskip(package)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), {})
        for given, words in commands(text) if not language else ():
            if "--memory-budget" in words:  # bounds the whole process, so it needs one of its own, as a user has
                words = [sys.executable, str(ROOT / "cli.py"), *words]
                done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            else:
                run(*words, input=given)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_loads_its_adapter(name, checkout, run, capsys):
    """The model card of every adapter that is shipped, and so of every one that this version writes."""
    done = 0
    for language, text in blocks(ROOT / "adapters" / name / "README.md"):
        if language == "python":
            exec(compile(text, name, "exec"), {})
            done += 1
        for _, words in commands(text) if not language else ():
            run(*words)
            done += 1
    assert done == 2


def test_the_notebook_runs(checkout, monkeypatch):
    """Its cells in order, in one name space, as a kernel would."""
    monkeypatch.chdir(checkout)
    names = {}
    for cell in json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # made anew, never stored
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["result"].after.per_1000_words < 0.7 * names["result"].before.per_1000_words
    assert (checkout / "adapters" / "fewer" / "xfactor.json").is_file()


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *ROOT.glob("*.md")], ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:xfactor_peft|tests|tools|docs)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
