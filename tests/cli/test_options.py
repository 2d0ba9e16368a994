"""Every option of every command: its help is true, and a file, a list, stdin or a percentage says what it seems to."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner

from tests.bank.loaded import bank_of
from xfactor_peft import options as library
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.cli import _COMMANDS, main
from xfactor_peft.cli.config import _key
from xfactor_peft.cli.rate import target_kind
from xfactor_peft.cli.run_options import make_recipe
from xfactor_peft.cli.tracking import tracking_options
from xfactor_peft.cli.train import SOURCE_TOKENS, _as_planned
from xfactor_peft.export import export
from xfactor_peft.options import DEFAULT_LR, DEFAULT_PROMPTS, EvalOptions, MemoryOptions, Recipe, SamplingOptions
from xfactor_peft.tokens.rule import Rule

ROOT = Path(__file__).parents[2]
FAST = ["--steps", "4", "--seq-len", "8", "--batch-size", "2", "--no-eval", "--dtype", "fp32"]


def all_commands():
    context = click.Context(main, info_name="xfactor")
    for name in _COMMANDS:
        command = main.get_command(context, name)
        inner = command.commands.items() if isinstance(command, click.Group) else [("", command)]
        yield from ((f"{name} {sub}".strip(), part) for sub, part in inner)


COMMANDS = dict(all_commands())
OPTIONS = [
    (name, p)
    for name, command in COMMANDS.items()
    for p in command.params
    if isinstance(p, click.Option) and not p.hidden
]


def help_of(name, width=80):
    return CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=width).output


def default_of(option):
    """What stands for an option that is not given; None where nothing does."""
    value = option.default
    return None if value is None or value is False or value == () or repr(value).startswith("Sentinel") else value


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name):
    """Each example is a command of this program whose options exist, and is shown unbroken."""
    command = COMMANDS[name]
    assert command.examples, name
    text = help_of(name, 60)
    for line in command.examples:
        assert f"  {line}\n" in text
        words = re.findall(r'"[^"]*"|\S+', line.split("| ")[-1])[1 + len(name.split()) :]
        known = {flag for param in command.params for flag in param.opts}
        assert all(word in known for word in words if word.startswith("--")), line
    assert all(len(line) <= 60 or line.strip() in command.examples for line in text.splitlines() if "|" not in line)
    assert all(param in [p.name for p in command.params] for param in command.first)
    assert len(command.first) == (5 if len(known) > 8 else 0)


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_every_option_says_what_it_does_and_its_default(name, option):
    _, text = option.get_help_record(click.Context(COMMANDS[name]))
    assert option.help, f"{name} {option.name} has no help"
    if (default := default_of(option)) is not None:
        assert "[default: " in text, f"{name} {option.name} hides its default {default!r}"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_of_the_help_is_empty_of_meaning(name):
    """An argument, which stands in the first line, is no row without a word; an adapter's base and set are its own."""
    text = help_of(name, 100)
    rows = text.partition("\n\n")[2].split("Examples:")[0].splitlines()
    assert not [row for row in rows if re.fullmatch(r" +\[?[A-Z]\S*", row)]
    takes_adapters = {param.name for param in COMMANDS[name].params} & {"adapter", "adapters", "name"}
    if takes_adapters and "--contains" in text:
        assert "[default: the adapter's own set; without one X]" in " ".join(text.split())
    if takes_adapters and "--model" in text:
        assert "[default: (the adapter's own base" in " ".join(text.split())


def test_a_plan_takes_what_train_takes(run, tiny_folders):
    """The same words after the command, whatever they are of; what is no new run for tokens is refused."""
    assert {p.name for p in COMMANDS["train"].params} <= {p.name for p in COMMANDS["plan"].params}
    model = ["--model", tiny_folders["gpt2"]]
    words = ["--words", "fox,the", "--ignore-case", "--target-rate", "5%", "--steps", 3, "--output", "x", "--seed", 1]
    assert "it fits into" in run("plan", *model, *words).output
    full = run("plan", *model, "--preset", "source").output
    assert full != run("plan", *model).output
    for other in (["--script", "Han"], ["--resume", "x"]):
        assert "a plan is of a new run for tokens" in run("plan", *model, *other, code=2).output


def defaults(name):
    """The options of a command as they are when nothing is given."""
    command = COMMANDS[name]
    return command.make_context(name, [], resilient_parsing=True).params


def test_defaults_of_train_are_those_of_the_library():
    flags = {**defaults("train"), "target": None}
    made = make_recipe(flags)
    lora = target_kind(flags).default_lora(Recipe().objective)
    assert made == Recipe(lora=lora)
    for rate, sequence, lora in ((0.1, False, "head"), (0.1, True, "all,head"), (None, False, "all")):
        assert make_recipe({**flags, "target_rate": rate, "sequence_level": sequence}).lora.target == lora
    text = " ".join(help_of("train").split())
    assert "[default: all; head for a rate; all,head with --sequence-level]" in text
    said = re.search(r"Learning rate. \[default: (\S+) for lora, (\S+) for full\]", text)
    assert {"lora": float(said[1]), "full": float(said[2])} == DEFAULT_LR
    assert f"[default: {SamplingOptions().max_new_tokens}]" in text.split("--eval-tokens")[1].split("--eval-repeats")[0]
    assert SOURCE_TOKENS
    assert tracking_options


def test_defaults_of_sampling_are_those_of_the_library():
    for name in ("generate", "eval", "play", "tokens"):
        flags = defaults(name)
        assert all(flags[key] == value for key, value in SamplingOptions().record().items()), name
    assert defaults("eval")["repeats"] == EvalOptions().repeats
    assert f"[default: { ({16: 'sixteen'}[len(DEFAULT_PROMPTS)]) } openings]" in " ".join(help_of("eval").split())


def test_the_default_model_of_an_adapter_is_its_own(run, adapters_root, tiny_folders):
    root = ["--adapters-dir", adapters_root, "--max-new-tokens", "2"]
    for command in ("generate", "eval", "play"):
        assert "[default: (the adapter's own base; without an adapter auto)]" in " ".join(help_of(command).split())
    first = f"model {tiny_folders['gpt2']} (the base of x)"
    assert run("generate", "--adapter", "none", "--adapter", "x", *root).output.startswith(first)
    assert run("eval", "--adapter", "x", "--repeats", "1", *root).output.startswith(first)
    assert run("play", "--adapter", "x", *root, input="").output.startswith(first)
    assert "made for" in run("generate", "--adapter", "x", "--model", tiny_folders["llama"], *root, code=2).output


@pytest.fixture
def trained(run, tiny_folders):
    """A run with options of every kind, in ./adapters/first."""
    words = ["--words", "fox,the", "--ignore-case", "--kl-to-base", 0.5, "--no-dial", "--lr", 1e-3]
    run("train", "--model", tiny_folders["gpt2"], *words, *FAST, "--output", "adapters/first")
    return Path("adapters/first")


def test_the_file_of_a_run_repeats_it(run, trained):
    """The same bytes, in another folder or in the same one; with a flag on top, other bytes."""
    weights = (trained / "adapter_model.safetensors").read_bytes()
    file = trained / "run.yaml"
    run("train", "--config", file, "--output", "adapters/again")
    assert Path("adapters/again/adapter_model.safetensors").read_bytes() == weights
    again = yaml.safe_load(Path("adapters/again/run.yaml").read_text())
    assert again == {**yaml.safe_load(file.read_text()), "output": "adapters/again"}
    run("train", "--config", file, "--seed", 1, "--output", "adapters/other")
    assert Path("adapters/other/adapter_model.safetensors").read_bytes() != weights
    assert yaml.safe_load(Path("adapters/other/run.yaml").read_text())["seed"] == 1
    assert "exists; pass --force" in run("train", "--config", file, code=2).output


def test_the_file_holds_every_option_that_has_a_value(trained):
    kept = yaml.safe_load((trained / "run.yaml").read_text())
    assert (kept["kl-to-base"], kept["seed"], kept["beta"]) == (0.5, 0, 0.0)
    assert kept["words"] == "fox,the"
    known = {_key(p): p for p in COMMANDS["train"].params if isinstance(p, click.Option)}
    assert kept.keys() <= known.keys()
    assert [key for key, option in known.items() if key not in kept and default_of(option) is not None] == []
    Path("rate.yaml").write_text("target-rate: 10%\nlog-with: [tensorboard, wandb]\nlambda:\n")
    flags = COMMANDS["train"].make_context("train", ["--config", "rate.yaml", "--seed", "3"]).params
    assert (flags["target_rate"], flags["trackers"], flags["strength"]) == (0.1, ("tensorboard", "wandb"), None)
    assert flags["seed"] == 3


MISTAKES = {
    "steps: [1, 2]": "steps takes one value",
    "stesp: 3": "`train` has no option 'stesp'. Did you mean 'steps'?",
    "contains: no": "contains takes a value; put a text in quotes",
    "contains: 10": "contains takes a text; put it in quotes: '10'",
    "no-eval: 3": "no-eval takes true or false",
    "just text": "must hold lines such as `steps: 100`",
    "a: [": "cannot be read as YAML",
    "method: loro": "'loro' is not one of 'lora', 'full'. Did you mean 'lora'?",
    "config: x.yaml": "has no option 'config'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_file_is_one_line(run, text):
    Path("c.yaml").write_text(text)
    output = run("train", "--config", "c.yaml", code=2).output
    assert MISTAKES[text] in output
    assert output.startswith("Error: ")


def test_did_you_mean(run, adapters_root):
    assert "Did you mean 'train'?" in run("trian", code=2).output
    assert "--lora-r" in run("train", "--lora-rr", 3, code=2).output
    assert "Did you mean 'gguf'?" in run("export", "x", "--format", "gguff", code=2).output
    near = ["adapters", "show", "heat", "--adapters-dir", adapters_root]
    assert "did you mean head?" in run(*near, code=2).output
    assert "id you mean" not in run("adapters", "show", "qqqq", "--adapters-dir", adapters_root, code=2).output


def test_words_are_a_list_a_file_or_stdin(run, tiny_folders):
    Path("w.txt").write_text("fox\nthe\n")
    Path("a,b").write_text("cat\n")
    assert Rule.read("words", "fox,the") == Rule.read("words", "w.txt") == Rule("words", ("fox", "the"))
    assert Rule.read("words", "a,b") == Rule("words", ("cat",))
    assert Rule.read("words", "fox") == Rule("words", ("fox",))
    assert Rule.read("token-ids", "5,17") == Rule("token-ids", (5, 17))
    model = ["--model", tiny_folders["gpt2"], "--json"]
    sets = [run("tokens", "--words", word, *model, input="fox\nthe\n").stdout for word in ("fox,the", "w.txt", "-")]
    assert len({json.loads(text)["tokens"]["hash"] for text in sets}) == 1
    for missing in ("nowhere.txt", "no/where"):
        assert "this file does not exist" in run("tokens", "--words", missing, code=2).output
    few = ("generate", *model, "--max-new-tokens", 2)
    assert run(*few, "-", input="The fox\n").stdout == run(*few, "The fox").stdout


@pytest.mark.parametrize(("text", "rate"), [("10%", 0.1), ("0.1", 0.1), ("7%", 0.07), ("0", 0.0), ("2.5%", 0.025)])
def test_rates_as_percentages(text, rate):
    assert library.parse_rate(text) == rate


def test_results_as_json(run, adapters_root, tiny_folders):
    """Standard output is one JSON value and nothing else; what people read goes to standard error."""
    root, short = ["--adapters-dir", adapters_root], ["--max-new-tokens", 4]
    model = ["--model", tiny_folders["gpt2"], "--dtype", "fp32"]
    calls = {
        "generate": ["--adapter", "none", "--adapter", "x", *root, *short, "A", "B"],
        "eval": ["--adapter", "x", *root, *short, "--repeats", 1],
        "tokens": [*model, *short, "--measure"],
        "plan": [*model, "--seq-len", 8],
        "train": [*model, *FAST],
        "env": [],
        "cache": [],
        "adapters list": root,
        "adapters show": ["x", *root],
        "adapters verify": ["x", "--files-only", *root],
        "adapters diff": ["x", "z", *root],
        "unslop": ["--texts", 4, "--length", 12, "--eval-texts", 2, "--add", "the"],
    }
    with_json = {name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}
    assert with_json == calls.keys()
    for name, arguments in calls.items():
        result = run(*name.split(), *arguments, "--json")
        assert json.loads(result.stdout), name
        assert result.stderr.strip(), name
    shown = json.loads(run("generate", *calls["generate"], "--json").stdout)
    assert [(part["prompt"], part["adapter"]) for part in shown] == [
        ("A", "base"),
        ("A", "x"),
        ("B", "base"),
        ("B", "x"),
    ]
    assert run("adapters", "list", *root).stdout.startswith("name")  # the switch does not outlast its command


def test_each_prompt_has_its_own_random_numbers(tiny):
    """Measured where nothing but the numbers matters: under the same uniform logits two prompts go different ways,
    and a prompt goes the same way after others, and under any adapter."""
    import torch

    from xfactor_peft.sampling.generation import generate, seed_for

    torch.nn.init.zeros_(tiny.model.get_output_embeddings().weight)
    texts = [
        generate(tiny.model, tiny.tokenizer, prompt, SamplingOptions()) for prompt in ("The fox", "A cat", "The fox")
    ]
    assert texts[0] == texts[2]
    assert sum(a == b for a, b in zip(texts[0], texts[1], strict=False)) < 8  # of 64, of a vocabulary of hundreds
    assert len({seed_for(seed, ids) for seed in range(9) for ids in ([1], [2], [1, 2], [12])}) == 36


def test_on_a_pipe_lines_are_whole_and_plain():
    command = [sys.executable, ROOT / "cli.py", "adapters", "list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"COLUMNS": "20"})
    assert len(done.stdout.splitlines()) == 1 + len(list((ROOT / "adapters").glob("*/adapter_config.json")))
    assert re.search(r"^demo-rate +demo +contains 'X' \(any case\) +10 % +0\.\d+ +10,560 *$", done.stdout, re.M)
    assert done.stdout.isascii()


def test_shells_complete_commands_options_and_adapters(monkeypatch):
    def completed(*words):
        line = " ".join(["xfactor", *words])
        environment = {"_XFACTOR_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        result = CliRunner(env=environment).invoke(main, [], prog_name="xfactor", complete_var="_XFACTOR_COMPLETE")
        return [line.partition(",")[2] for line in result.output.splitlines()]

    monkeypatch.chdir(ROOT)
    assert completed("gen") == ["generate"]
    assert completed("train", "--target-r") == ["--target-rate"]
    assert "demo-rate" in completed("generate", "--adapter", "demo-")
    assert completed("adapters", "show", "demo-Z") == ["demo-Z"]


def test_weights_are_mapped_where_a_run_would_not_fit_otherwise(run, tiny_folders):
    """And not where it fits, nor where they are to stay in memory: then the plan refuses."""
    command = ["--model", tiny_folders["gpt2"], "--load-in-8bit", *FAST]
    totals = {}
    for kind in ("mapped", "memory"):
        run("train", *command, "--weights", kind, "--output", kind)
        totals[kind] = json.loads(Path(kind, "xfactor.json").read_text())["plan"]["total"]
    between = ["--memory-budget", f"{sum(totals.values()) // 2 // 2**20}MiB"]
    assert ", mapped from disk" in run("train", *command, *between, "--output", "a").output
    assert ", mapped from disk" not in run("train", *command, "--memory-budget", "64GiB", "--output", "b").output
    refused = run("train", *command, *between, "--weights", "memory", "--output", "c", code=2).output
    assert "the run needs about" in refused
    assert not Path("c").exists()


@pytest.mark.parametrize("command", [["plan"], ["train", "--output", "a"]])
def test_weights_of_a_gguf_file_stay_where_they_are(run, load_tiny, tmp_path, command):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    export(bank_of(load_tiny(), tmp_path), Mix(), "gguf", tmp_path / "base.gguf")
    output = run(*command, "--model", "base.gguf", "--weights", "memory", code=2).output
    assert " ".join(output.split()).endswith("the weights of base.gguf stay mapped; drop --weights memory")
    assert not Path("a").exists()


def test_a_packed_file_counts_its_recomputed_blocks_again_once_it_is_read():
    """What a plan says before loading stands for other models, and where the user gave a number."""
    plan = SimpleNamespace(recomputed=3, memory=SimpleNamespace(total=700))
    auto = MemoryOptions()
    assert _as_planned(auto, plan, packed=True) is auto
    assert _as_planned(MemoryOptions(2), plan, packed=True) == MemoryOptions(3, 700)
    assert _as_planned(auto, plan, packed=False) == MemoryOptions(3, 700)
    assert _as_planned(MemoryOptions(budget=900), plan, packed=False) == MemoryOptions(3, 900)
