"""From a name on the Hub to an adapter: download, train, swap; then offline, and what is said when it cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.hub_stand_in import HubStandIn
from tests.tiny import tiny_tokenizer
from tools.make_checkpoint import write_checkpoint

pytest_plugins = ["tests.hub.hub_fixture"]

NAME = "openai-community/gpt2-medium"
TOKENS = ["tokens", "--measure", "--max-new-tokens", "4"]
PROJECT = Path(__file__).parents[2]
TRAIN = ["train", "--lora-r", "8", "--steps", "3", "--seq-len", "8", "--eval-tokens", "4", "--eval-repeats", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny checkpoint in the exact layout of the Hub's gpt2 files."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(tokenizer)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", tokenizer=tokenizer)


def command(hub: HubStandIn, folder: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Run the command line in `folder`; returns what it printed, errors included."""
    result = subprocess.run(
        [sys.executable, PROJECT / "cli.py", *words], cwd=folder, capture_output=True, text=True, check=False,
        env=hub.environment(folder / "cache", OMP_NUM_THREADS="1", COLUMNS="300", **variables),
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def test_train_by_name_then_offline(online, checkpoint, run, tmp_path):
    """`train --lora-r 8` finds GPT-2 Medium on the Hub by itself; later the cache is enough."""
    online.add(NAME, checkpoint)
    output = command(online, tmp_path, *TRAIN)
    assert output.startswith(f"model {NAME} (downloaded from the Hub), ")
    record = json.loads((tmp_path / "adapters/X-lora-r8/xfactor.json").read_text())
    assert (record["base"]["name"], record["base"]["revision"]) == (NAME, online.commit(NAME))
    config = json.loads((tmp_path / "adapters/X-lora-r8/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME
    online.close()
    asked = len(online.requests)
    offline = [*TRAIN, "--offline", "--load-in-8bit", "--output", "adapters/again"]
    assert run(*offline).output.startswith(f"model {NAME} (in the local cache), ")
    shown = run("generate", "--offline", "--adapter", "X-lora-r8", "--max-new-tokens", "4").output
    assert "X-lora-r8 x 1" in shown
    assert len(online.requests) == asked


def test_the_demo_model_stands_in_only_unasked(online, run):
    """Nothing on the Hub: `auto` takes the demo model and says why; a model that was named is never replaced."""
    assert run(*TOKENS).output.startswith(f"model demo ({NAME} ")
    for name in (NAME, "someone/else"):
        error = run("tokens", "--model", name, code=2).output
        assert f"Error: --model {name}: no such repository on the Hub" in error


def test_offline_touches_no_network(online, run, tmp_path):
    """In this process, and in one of its own, where nothing is left out of the account."""
    for output in (run(*TOKENS, "--offline").output, command(online, tmp_path, *TOKENS, "--offline")):
        assert output.startswith(f"model demo ({NAME} is not in the local cache, and --offline)")
    assert "--offline forbids the network" in run("tokens", "--offline", "--model", "someone/else", code=2).output
    assert online.requests == []


def test_an_unreachable_hub_says_what_to_do(online, checkpoint, run):
    online.add(NAME, checkpoint)
    online.close()
    error = run("tokens", "--model", NAME, code=2).output
    assert "cannot be downloaded" in error
    assert "check the connection and try again, or use --model demo or a local folder" in error
