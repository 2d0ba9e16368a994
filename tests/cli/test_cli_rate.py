"""The command line of rates: what it trains, what it prints, and one line for every mistake."""

import json
from pathlib import Path

import pytest

BRIEF = ["--steps", "20", "--seq-len", "24", "--eval-tokens", "32", "--eval-repeats", "4"]


def test_a_rate_from_flags_to_text(run, tiny_folders):
    model = ["--model", tiny_folders["gpt2"], "--dtype", "fp32"]
    flat = " ".join(run("train", *model, "--target-rate", "0.2", *BRIEF).output.split())
    for words in (
        "wanted rate 0.2", "set head: rank 1 on lm_head", "no training steps: the set head is solved",
        "wanted R 0.2, sampled 0.",
        "nothing is left to learn", "x that of one constant", "openings", "short", "dial, scale: R",
        "KL: mass + inside + outside", "saved to adapters/X-rate-0.2-head",
    ):  # fmt: skip
        assert words in flat, words
    record = json.loads(Path("adapters/X-rate-0.2-head/xfactor.json").read_text())
    assert record["target"]["goals"][0]["rate"] == 0.2
    assert record["after"]["rate"] == pytest.approx(0.2, abs=0.07)
    assert "the base, tilted" in Path("adapters/X-rate-0.2-head/README.md").read_text()
    adapter = ["generate", *model, "--adapter", "X-rate-0.2-head", "--max-new-tokens", "16", "The fox"]
    assert "X-rate-0.2-head x 0." in run(*adapter, "--rate", "0.1").output
    assert "outside what adapter" in run(*adapter, "--rate", "0.99", code=2).output
    assert "--rate and --scale exclude" in run(*adapter, "--rate", "0.1", "--scale", "0.5", code=2).output
    assert "--rate needs --adapter" in run("generate", *model, "--rate", "0.1", code=2).output
    scores = run("eval", *model, "--adapter", "X-rate-0.2-head", "--repeats", 2, "--max-new-tokens", 16, "--frontier")
    assert "X-rate-0.2-head: wanted R 0.2, sampled" in " ".join(scores.output.split())
    assert "x that of an exact logit bias" in " ".join(scores.output.split())


def test_goals_and_sequence_level(run, tiny_folders):
    model = ["--model", tiny_folders["gpt2"], "--dtype", "fp32"]
    output = run(
        "train", *model, "--goal", "contains:X=0.2", "--goal", "contains:e=0", "--sequence-level",
        "--sequence-steps", "3", "--no-dial", *BRIEF,
    ).output  # fmt: skip
    flat = " ".join(output.split())
    assert "wanted rate 0.2" in flat
    assert "wanted rate 0" in flat
    assert "set head: rank 2 on lm_head" in flat
    assert "on 8 layers" in flat
    assert Path("adapters/X-rate-0.2-and-1-more-all-head/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("flags", "constant"), [([], False), (["--no-early-stop"], True)])
def test_a_head_that_is_one_constant_says_so(run, tiny_folders, flags, constant):
    brief = ["--steps", 1, "--seq-len", 16, "--no-dial", "--no-eval"]
    output = run(
        "train", "--model", tiny_folders["gpt2"], "--dtype", "fp32", "--target-rate", 0.2, *brief, *flags
    ).output
    assert ("the set head is one constant" in " ".join(output.split())) == constant


def test_words_without_a_token_are_named(run, tiny_folders):
    """They are no part of the set, and a user who wrote them would not know."""
    brief = ["--steps", 1, "--seq-len", 8, "--no-eval", "--output", "out"]
    output = run("train", "--model", tiny_folders["gpt2"], *brief, "--words", "fox,zymurgy").output
    assert "left out, for the vocabulary has no token for it: zymurgy" in " ".join(output.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-rate", "1.5"], "--target-rate must be at least 0 and below 1; got 1.5"),
        (["--target-rate", "0.1", "--lambda", "2"], "--target-rate and --lambda exclude each other"),
        (["--goal", "X=0.1"], "expected KIND:VALUE=RATE"),
        (["--goal", "contains:X=0.1", "--contains", "X"], "--goal names its own set; drop --contains"),
        (["--goal", "contains:X=0.6", "--goal", "contains:e=0.6"], "no tilt gives the rates"),
        (["--target", "head"], "--target head needs a rate"),
        (["--target-rate", "0.1", "--method", "full"], "--target-rate needs --method lora"),
        (["--target-rate", "0.1", "--preset", "source"], "is a uniform target; drop --target-rate"),
        (["--target-rate", "0.1", "--alpha", "2"], "--alpha and --beta belong to the uniform target"),
        (["--target-rate", "0.1", "--kl-to-base", "1"], "--kl-to-base belongs to the uniform target"),
        (["--sequence-level"], "--sequence-level needs --target-rate"),
        (["--target-rate", "0.1", "--sequence-level", "--target", "head"], "use --target all,head"),
        (["--lambda", "2", "--sequence-level"], "--sequence-level needs --target-rate, not --lambda"),
        (["--lambda", "inf"], "--lambda must be between"),
        (["--contexts", "nowhere"], "--contexts must be random, self or a text file"),
        (["--kl-to-base", "-1"], "--kl-to-base must be at least 0"),
        (["--target-rate", "0.1", "--outside-price", "2"], "--sequence-steps and --outside-price are about planning"),
        (["--sequence-steps", "7"], "they need --sequence-level"),
    ],
)
def test_mistakes_are_one_line(run, tiny_folders, flags, message):
    output = run("train", "--model", tiny_folders["gpt2"], *BRIEF, *flags, code=2).output
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not Path("adapters").exists() or not list(Path("adapters").iterdir())
