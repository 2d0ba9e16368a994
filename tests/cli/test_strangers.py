"""Strings that did not come from us: printed as they are, never as markup, never as orders to a terminal."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from xfactor_peft.cli.console import PlainConsole, say
from xfactor_peft.tokens.printable import printable

ROOT = Path(__file__).parents[2]
ESC = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def strange(adapters_root, tmp_path):
    """An adapter whose every free text is a trap."""
    shutil.copytree(adapters_root / "z", tmp_path / "adapters" / "z")
    folder = shutil.copytree(adapters_root / "x", tmp_path / "adapters" / "x")
    record = json.loads((folder / "xfactor.json").read_text())
    record["tokens"]["rule"]["value"] = "[/X]"
    name = record["base"]["name"] = f"[/red]:smile:{ESC}\u202e"
    (folder / "xfactor.json").write_text(json.dumps(record))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    config["target_modules"] = [f"attn{ESC}", "[bold]mlp[/x]"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_markup_in_a_rule_is_text(strange, run):
    output = run("adapters", "list").output
    assert "contains '[/X]'" in output
    assert "[/red]:smile:" in output
    assert "\x1b" not in output
    output = run("adapters", "show", "x").output
    assert "[bold]mlp[/x], attn\ufffd]0;owned\ufffd\ufffd[31m" in output
    assert "\x1b" not in output
    assert "contains '[/X]'" in run("adapters", "diff", "x", "z").output


def test_an_error_and_a_path_hold_no_orders(strange, run, tiny_folders):
    output = run("generate", "--model", tiny_folders["gpt2"], "--adapter", "x", code=2).output
    assert "Error: " in output
    assert "\x1b" not in output
    folder = Path(shutil.copytree(tiny_folders["gpt2"], f"model{ESC}[/x]"))
    for command in (
        ["plan"],
        ["generate", "[/y]", "--contains", "X", "--max-new-tokens", 2],
        ["tokens", "--measure", "--max-new-tokens", 2],
    ):
        output = (
            run(*command, "--model", folder).output if command[0] != "plan" else run("plan", "--model", folder).output
        )
        assert "\x1b" not in output
        assert "[/x]" in output.splitlines()[0]


@pytest.mark.parametrize(
    "thing",
    [
        lambda text: text,
        lambda text: _table(text),
        lambda text: Panel(text, title=Text(text)),
        lambda text: Text(text, style="bold"),
    ],
)
def test_everything_goes_through_one_console(thing):
    """Also on a terminal, where rich's own orders (colours) pass."""
    text = f"[/X] :smile: {ESC}[bold]"
    for terminal in (False, True):
        file = io.StringIO()
        PlainConsole(file=file, markup=False, emoji=False, highlight=False, width=120, force_terminal=terminal).print(
            thing(text)
        )
        written = file.getvalue()
        assert "[/X] :smile:" in written
        assert "[bold]" in written
        assert "\x1b]" not in written
        assert "\x1b[31m" not in written


def _table(text):
    table = Table(text)
    table.add_row(text)
    return table


def test_colours_still_reach_a_terminal():
    file = io.StringIO()
    PlainConsole(file=file, force_terminal=True, color_system="standard").print("x", style="red")
    assert "\x1b[31m" in file.getvalue()


def test_only_control_characters_are_marked(capsys):
    assert printable("é☃\n\tß 漢") == "é☃\n\tß 漢"
    say(f"a{ESC}b\u202ec")
    assert capsys.readouterr().out == "a\ufffd]0;owned\ufffd\ufffd[31mb\ufffdc\n"


def started(folder, words, stdin=subprocess.DEVNULL, **environment):
    command = [sys.executable, "-c", "from xfactor_peft.cli import main; main()", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", **environment}
    return subprocess.run(command, cwd=folder, env=environment, stdin=stdin, capture_output=True, timeout=200)


def test_an_output_that_knows_ascii_alone(tiny_folders, tmp_path):
    words = [
        "generate",
        "--model",
        tiny_folders["gpt2"],
        "na\u00efve \u2603",
        "--max-new-tokens",
        8,
        "--contains",
        "\u00e9",
    ]
    done = started(tmp_path, [*words[:5], "8"], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"'na\\xefve \\u2603'" in done.stdout
    done = started(tmp_path, [*words[:5], "8", "--contains", "\u2603\u2603"], PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert b"Error: no token matches contains '\\u2603\\u2603'" in done.stderr


def test_play_without_a_standard_input(tiny_folders, tmp_path):
    words = ["play", "--model", tiny_folders["gpt2"]]
    line = " ".join(
        ["exec", sys.executable, "-c", "'from xfactor_peft.cli import main; main()'", *map(str, words), "<&-"]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert b"A prompt, or /help." in done.stdout
    assert b"Traceback" not in done.stderr


def test_play_reads_bytes_that_are_no_text(run, tiny_folders):
    output = run("play", "--model", tiny_folders["gpt2"], "--max-new-tokens", 4, input=b"caf\xe9\n/quit\n").output
    assert output.rstrip().endswith("bye")
