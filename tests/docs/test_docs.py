"""The commands and the Python of the documentation, run as they stand on the tiny GPT-2 in place of the demo model."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# page -> optional packages that it needs
PAGES = {
    "adapters.md": [],
    "export.md": ["gguf"],
    "hub.md": [],
    "low-memory.md": [],
    "models.md": [],
    "playground.md": [],
    "swap.md": [],
    "trainer.md": ["tensorboard"],
    "variants.md": [],
}


@pytest.fixture
def workplace(run, tiny_folders, adapters_root, tmp_path):
    """An empty folder with the adapters that the pages speak of."""
    for name, source in (("X-lora-r8", "x"), ("Z-lora-r4", "z"), ("X-head", "head")):
        shutil.copytree(adapters_root / source, tmp_path / "adapters" / name)
    return tmp_path


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page, workplace, run, tiny_folders, capsys):
    for package in PAGES[page]:
        pytest.importorskip(package)
    done = 0
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text.replace('"demo"', repr(str(tiny_folders["gpt2"]))), page, "exec"), {})
            done += 1
        for line in text.replace("\\\n", " ").splitlines() if language == "" else ():
            words = shlex.split(line)
            if words[:1] == ["xfactor"]:
                run(*[str(tiny_folders["gpt2"]) if word == "demo" else word for word in words[1:]])
                done += 1
    assert done, f"{page} has nothing to run"
