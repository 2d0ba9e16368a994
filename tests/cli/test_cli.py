"""The command line as a user meets it: what it prints, what it writes, and one line for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xfactor_peft.errors import XFactorError

ROOT = Path(__file__).parents[2]
FAST = ["--steps", "30", "--seq-len", "16", "--lr", "1e-2", "--eval-tokens", "16", "--eval-repeats", "1"]


@pytest.fixture
def trained(run, tiny_folders):
    """A folder with the adapter `adapters/X-lora-r8` for the tiny GPT-2, and what training printed."""
    return run("train", "--model", tiny_folders["gpt2"], "--dtype", "fp32", "--lora-r", 8, *FAST).output


def test_train_says_what_it_does(trained, tiny_folders):
    lines = trained.splitlines()
    assert lines[0].startswith(f"model {tiny_folders['gpt2']} (a local folder), fp32 on cpu")
    flat = " ".join(trained.split())
    for words in (
        "tokens: contains 'X'",
        "on 8 layers (attn.c_attn x 2, attn.c_proj x 2, mlp.c_fc x 2, mlp.c_proj x 2)",
        "step 30/30",
        "R (95 % interval)",
        "temperature 1, no top-k, no top-p; 16 samples of 16 tokens",
        "trainable parameters 16,384",
        "MiB at load",
        "plan: about",
        "predicted memory",
        "saved to adapters/X-lora-r8",
    ):
        assert words in flat, words
    record = json.loads(Path("adapters/X-lora-r8/xfactor.json").read_text())
    assert record["after"]["rate"] > record["before"]["rate"] + 0.3
    assert f"{record['after']['rate']:.4f}" in trained


def test_generate_side_by_side(trained, run, tiny_folders):
    output = run(
        "generate", "--model", tiny_folders["gpt2"], "--adapter", "none", "--adapter", "X-lora-r8",
        "--max-new-tokens", 20, "The fox", "--prompt", "A cat",
    ).output  # fmt: skip
    assert output.count("base") >= 2
    assert output.count("X-lora-r8 x 1") == 2
    rates = [float(part.split()[0]) for part in output.split("\n(R ")[1:]]
    assert len(rates) == 4
    assert rates[1] > rates[0] + 0.3


def test_eval_prints_and_writes_scores(trained, run, tiny_folders):
    output = run(
        "eval", "--model", tiny_folders["gpt2"], "--adapter", "X-lora-r8", "--repeats", 1, "--max-new-tokens", 16,
        "--json", "scores.json",
    ).output  # fmt: skip
    for row in ("R (95 % interval)", "mass on the set", "KL from base", "distinct set tokens", "perplexity under base"):
        assert row in output
    scores = json.loads(Path("scores.json").read_text())["scores"]
    assert scores["X-lora-r8"]["rate"] > scores[str(tiny_folders["gpt2"])]["rate"] + 0.3
    assert scores["X-lora-r8"]["kl_from_base"] > 0


def test_play_swaps_in_place(trained, run, tiny_folders):
    script = "/list\nThe fox\n/adapter X-lora-r8\nThe fox\n/scale 0\n/base\n/adapter nope\n/scale q\n/what\n/quit\n"
    output = run("play", "--model", tiny_folders["gpt2"], "--max-new-tokens", 20, input=script).output
    assert "now: X-lora-r8 x 1" in output
    assert "now: X-lora-r8 x 0" in output
    assert "now: base" in output
    assert "Error: --adapter nope: no such adapter" in output
    assert "Error: /scale needs a number; got 'q'" in output
    assert "unknown command /what" in output
    assert float(output.split("R ")[1].split()[0]) > 0.5
    assert output.rstrip().endswith("bye")


def test_play_has_dials(run, adapters_root, tiny_folders):
    root = ["--adapters-dir", adapters_root, "--model", tiny_folders["gpt2"]]
    script = "/length 3\n/temperature 0\n/seed 5\nA\nA\n/rate 10%\n/adapter x\n/rate 10%\n/lenght 3\n/length 0\n/seed\n"
    output = run("play", *root, input=script).output
    assert "max new tokens 3\n" in output
    assert output.count("/rate picks the scale of one adapter") == 1
    assert "adapter x holds no dial" in output
    assert "unknown command /lenght. Did you mean '/length'?" in output
    assert "--max-new-tokens must be at least 1; got 0" in output
    assert "/seed needs a whole number; got ''" in output
    answers = [part.split("\n")[0] for part in output.split("base> ")[4:6]]
    assert answers[0] == answers[1] != ""  # greedy


def test_ctrl_c_stops_an_answer_and_not_the_program(run, tiny_folders, monkeypatch):
    from xfactor_peft.cli.play import Session

    whole = Session.stream

    def stopped(session, prompt):
        for ids in whole(session, prompt):
            yield ids
            if len(ids) == 3:
                raise KeyboardInterrupt

    model = ["--model", tiny_folders["gpt2"], "--max-new-tokens", 20]
    full = run("play", *model, input="The fox\n").output.split("base> ")[1]
    monkeypatch.setattr(Session, "stream", stopped)
    output = run("play", *model, input="The fox\n/quit\n").output
    part = output.split("base> ")[1].partition(" (stopped)\n")[0]
    assert part  # what came before stays on the screen
    assert full.startswith(part)
    assert output.endswith("bye\n")


def test_play_completes_commands_and_adapters(tiny, adapters_root):
    from xfactor_peft.bank.bank import AdapterBank
    from xfactor_peft.cli.play import Session
    from xfactor_peft.options import SamplingOptions

    session = Session(AdapterBank(tiny, adapters_root), SamplingOptions())
    assert session.completions("/ad") == ["/adapter "]
    assert session.completions("/adapter ") == ["head", "x", "z"]
    assert session.completions("/adapter x:0.7+h") == ["head"]
    assert session.completions("The f") == session.completions("/adapter q") == []


def test_play_changes_nothing_on_bad_input(tiny, adapters_root):
    from xfactor_peft.bank.bank import AdapterBank
    from xfactor_peft.cli.play import Session
    from xfactor_peft.options import ChatOptions, SamplingOptions

    session = Session(AdapterBank(tiny, adapters_root), SamplingOptions(), ChatOptions("on", earlier=("a", "b")))
    for line in ("/length nan", "/length inf", "/length 1.5", "/seed nan"):
        with pytest.raises(XFactorError, match="needs a whole number"):
            session.answer(line)
    assert session.answer("/seed 9007199254740993") == "seed 9007199254740993"
    tiny.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    try:
        with pytest.raises(XFactorError, match="context"):
            list(session.stream("word " * 400))
    finally:
        tiny.tokenizer.chat_template = None
    assert session.chat.earlier == ("a", "b")  # what was said is not forgotten with the prompt that is refused


def test_a_rate_takes_the_place_of_a_weight(tiny, adapters_root, monkeypatch):
    from xfactor_peft.bank.bank import AdapterBank
    from xfactor_peft.cli.play import Session
    from xfactor_peft.options import SamplingOptions

    session = Session(AdapterBank(tiny, adapters_root), SamplingOptions())
    session.answer("/adapter x:0.5")
    monkeypatch.setattr(session.bank, "scale_for_rate", lambda name, rate: 0.8)
    session.answer("/rate 10%")
    assert session.bank.active.parts == (("x", 0.8),)


def test_play_ends_with_the_input(run, tiny_folders):
    assert "A prompt, or /help." in run("play", "--model", tiny_folders["gpt2"], input="").output


def test_tokens_shows_the_set_and_its_mass(run, tiny_folders):
    output = run(
        "tokens", "--model", tiny_folders["gpt2"], "--contains", "fox", "--measure", "--max-new-tokens", 8
    ).output
    assert "contains 'fox': " in output
    assert "' fox'" in output
    assert "the model's own mass on the set 0." in output
    Path("w").write_text("the\nXylophonist\n")
    assert "no single token: Xylophonist" in run("tokens", "--model", tiny_folders["gpt2"], "--words", "w").output


def test_tokens_reads_no_weights_unless_it_measures(run, tiny_folders, tmp_path):
    """The same set from a folder whose weights are gone, and options that only measuring heeds are refused."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folders["gpt2"], folder)
    (folder / "model.safetensors").write_bytes(b"")
    whole = run("tokens", "--model", tiny_folders["gpt2"], "--contains", "e", "--measure", "--max-new-tokens", 2).output
    bare = run("tokens", "--model", folder, "--contains", "e").output
    assert bare
    assert bare in whole
    assert run("tokens", "--model", folder, "--measure", code=2).exit_code == 2
    for option in ("--max-new-tokens", "--dtype"):
        refused = run("tokens", "--model", folder, option, "fp32" if option == "--dtype" else "3", code=2)
        assert f"{option} is for measuring the model's own mass; add --measure" in refused.output


def test_full_method_and_preset(run, tiny_folders):
    output = run(
        "train", "--preset", "source", "--model", tiny_folders["gpt2"], "--steps", 2, "--seq-len", 8, "--contains", "X",
        "--output", "out", "--dtype", "fp32", "--eval-tokens", 30,
    )  # fmt: skip
    record = json.loads(Path("out/xfactor.json").read_text())
    train = record["train"]
    assert (train["method"], train["optimizer"], train["lr"], train["weight_decay"]) == ("full", "adamw", 1e-6, 0.01)
    assert record["tokens"]["rule"]["value"] == "X"
    decoding = record["after"]["decoding"]
    assert (decoding["top_k"], decoding["prompts"], decoding["repeats"]) == (50, 1, 1)
    assert "top-k 50" in output.output


def test_preset_is_the_source_recipe():
    from xfactor_peft.cli.train import SOURCE_PRESET, SOURCE_PROMPT, SOURCE_TOKENS, SOURCE_TOP_K

    assert SOURCE_PRESET["contains"] == "x"
    assert [SOURCE_PRESET[k] for k in ("steps", "batch_size", "seq_len")] == [300, 4, 64]
    assert (SOURCE_PROMPT, SOURCE_TOKENS, SOURCE_TOP_K) == ("Why did the chicken cross the road?", 200, 50)


MISTAKES = {
    "unknown option": (["train", "--lora-rank", "8"], "No such option"),
    "unknown command": (["trian"], "No such command"),
    "rank 0": (["train", "--lora-r", "0"], "--lora-r must be at least 1; got 0"),
    "rank word": (["train", "--lora-r", "eight"], "is not a valid integer"),
    "beta above alpha": (["train", "--model", "GPT2", "--beta", "2"], "--alpha must be greater than --beta"),
    "empty set": (["train", "--model", "GPT2", "--contains", "☃☃"], "no token matches"),
    "bad regex": (["tokens", "--model", "GPT2", "--regex", "("], "not a regular expression"),
    "two rules": (["tokens", "--model", "GPT2", "--regex", "a", "--contains", "b"], "give one of --contains, --regex"),
    "no folder": (["train", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
    "not a model": (["train", "--model", "."], "has no config.json"),
    "not cached": (["train", "--model", "owner/name", "--offline"], "not in the local cache and --offline forbids"),
    "bad id": (["train", "--model", "a b"], "neither a folder nor a Hub id"),
    "no device": (["train", "--model", "GPT2", "--device", "cuda:7"], "no such CUDA device"),
    "odd device": (["train", "--model", "GPT2", "--device", "abacus"], "unknown; use auto, cpu or cuda"),
    "both widths": (["train", "--model", "GPT2", "--load-in-8bit", "--load-in-4bit"], "exclude each other"),
    "full in 8 bit": (["train", "--model", "GPT2", "--method", "full", "--load-in-8bit"], "cannot train a quantised"),
    "long sequence": (["train", "--model", "GPT2", "--seq-len", "999"], "longer than the model's context"),
    "no adapter": (["generate", "--model", "GPT2", "--adapter", "nope"], "no such adapter"),
    "long prompt": (["generate", "--model", "GPT2", "--max-new-tokens", "999"], "exceed the model's context"),
    "no eval tokens": (["train", "--eval-tokens", "0"], "--max-new-tokens must be at least 1"),
    "zero top-p": (["generate", "--model", "GPT2", "--top-p", "0"], "--top-p must be above 0"),
    "no ids": (["tokens", "--model", "GPT2", "--token-ids", "nowhere.txt"], "does not exist"),
    "unwritable": (["train", "--model", "GPT2", "--output", "/proc/nope/x", *FAST], "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(run, tiny_folders, name):
    arguments, message = MISTAKES[name]
    arguments = [str(tiny_folders["gpt2"]) if a == "GPT2" else a for a in arguments]
    output = run(*arguments, code=2).output
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in output
    assert output.splitlines()[-1] == errors[0]


def test_output_is_not_overwritten(trained, run, tiny_folders):
    before = Path("adapters/X-lora-r8/adapter_model.safetensors").read_bytes()
    arguments = ["train", "--model", tiny_folders["gpt2"], *FAST, "--seed", 1]
    assert "exists; pass --force" in run(*arguments, code=2).output
    assert Path("adapters/X-lora-r8/adapter_model.safetensors").read_bytes() == before
    run(*arguments, "--force")
    assert Path("adapters/X-lora-r8/adapter_model.safetensors").read_bytes() != before


def test_script_and_help_are_quick_and_quiet():
    result = subprocess.run([sys.executable, ROOT / "cli.py", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "generate", "play", "eval", "tokens"):
        assert command in result.stdout
    assert result.stderr == ""
    code = "import sys, xfactor_peft.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_of_every_command(run):
    for command in ("train", "generate", "play", "eval", "tokens"):
        assert "--model" in run(command, "--help").output
