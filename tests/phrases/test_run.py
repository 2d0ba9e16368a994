"""From one command to an adapter for phrases, and what the other commands make of it, on the bundled model."""

import json

import pytest
import yaml
from click.testing import CliRunner

from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.cli import main
from xfactor_peft.export import export
from xfactor_peft.options import LoadOptions
from xfactor_peft.tokens.patterns import found, phrases

WORDS = ["the", "little girl", "said*"]
RULES = {
    "goals": [{"phrases": WORDS, "rate": 0}],
    "prompts": ["Once upon a time", "The fox", "One day", "In the house"],
    "options": {"texts": 16, "length": 40, "eval_texts": 16, "epochs": 20, "trunk_epochs": 1, "lr": 0.01},
}


def run(*arguments, code=0, given=None):
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=given)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phrases")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    output = run("train", "--rules", folder / "rules.yaml", "--output", folder / "plain", "--seed", 1)
    return folder, output


def test_the_words_are_gone(trained):
    folder, output = trained
    record = json.loads((folder / "plain" / "xfactor.json").read_text())["phrases"]
    assert record["before"]["per_1000_words"] > 50
    assert record["after"]["per_1000_words"] < 0.2 * record["before"]["per_1000_words"]
    assert record["after"]["kl"] > 0
    assert f"{record['after']['per_1000_words']:.2f}" in output
    page = (folder / "plain" / "before-after.html").read_text()
    assert "<mark>" in page
    assert "What came instead" in page


def test_its_own_record_makes_it_again(trained):
    folder, _ = trained
    assert (folder / "plain" / "run.yaml").read_text().startswith("# Repeats this run: xfactor train --config ")
    run("train", "--config", folder / "plain" / "run.yaml", "--output", folder / "again", "--no-eval")
    first, second = ((folder / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "again"))
    assert first == second


def test_other_commands_know_it(trained):
    folder, _ = trained
    shown = run("adapters", "show", folder / "plain")
    assert "phrases, 3 patterns: never" in shown
    assert "after" in shown
    listed = run("adapters", "list", "--adapters-dir", folder)
    assert "phrases, 3 patterns" in listed
    assert "never" in listed
    checks = run("adapters", "verify", folder / "plain")
    assert "failed" not in checks
    assert "in 1,000 words" in checks


def test_eval_counts_what_it_is_about(trained):
    folder, _ = trained
    scores = json.loads(run("eval", "--adapter", folder / "plain", "--repeats", 8, "--json", "-"))["scores"]
    base, adapted = scores.values()
    assert adapted["per_1000_words"] < 0.3 * base["per_1000_words"]
    assert base["kl"] == 0 < adapted["kl"]


def test_eval_takes_prompts_from_standard_input_and_for_a_chat(trained):
    """Both are refused or lost for adapters that are about tokens alone."""
    folder, _ = trained
    arguments = ("eval", "--adapter", folder / "plain", "--repeats", 2, "--json", "-", "--prompts", "-")
    for given in ("Once upon a time", json.dumps({"prompt": "Tell me a story.", "chat": True})):
        record = json.loads(run(*arguments, given=given))
        assert record["decoding"]["prompts"] == 1


def test_what_cannot_be_written_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("xfactor_peft.phrases.train.train_phrases", lambda *_: pytest.fail("it has begun"))
    shown = CliRunner().invoke(main, ["unslop", "--model", "demo", "--output", str(tmp_path / "file" / "out")])
    assert shown.exit_code == 2
    assert "cannot be written" in shown.output


def test_a_reference_text_takes_the_place_of_rates_and_says_so(trained):
    folder, _ = trained
    (folder / "words.txt").write_text("the")
    (folder / "human.txt").write_text("The fox saw the cat.")
    words = f"{folder / 'words.txt'}=x0.5"
    shown = CliRunner().invoke(main, ["train", "--phrases", words, "--rates-from", str(folder / "human.txt")])
    assert shown.exit_code == 2
    assert "--rates-from sets every rate; drop the one of" in " ".join(shown.output.split())


def test_generated_texts_show_what_they_hold(trained):
    folder, _ = trained
    counts = {}
    for adapter in ("none", folder / "plain"):
        given = ("--adapter", adapter, "--max-new-tokens", 60, "Once upon a time")
        [record] = json.loads(run("generate", "--adapter", folder / "plain", *given, "--json"))[-1:]
        counts[adapter] = sum(len(found(p, record["text"])) for p in phrases(WORDS))
        assert record["occurrences"] == counts[adapter]
        assert record["rates"] == []
    assert counts[folder / "plain"] < counts["none"]


def test_a_packed_base_learns_the_same(trained, tmp_path):
    """The bundled model in a GGUF file, where the output embedding is only read in pieces and by rows."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    folder, _ = trained
    file, output = tmp_path / "demo.gguf", tmp_path / "packed"
    export(AdapterBank(load_base(resolve_model("demo"), LoadOptions("fp32")), tmp_path), Mix(), "gguf", file)
    run("train", "--model", file, "--rules", folder / "rules.yaml", "--output", output, "--seed", 1)
    plain, packed = (
        json.loads((where / "xfactor.json").read_text())["phrases"] for where in (folder / "plain", output)
    )
    assert packed["before"]["per_1000_words"] == pytest.approx(plain["before"]["per_1000_words"], rel=0.2)
    assert packed["after"]["per_1000_words"] < 0.2 * packed["before"]["per_1000_words"]
    assert 0 < packed["after"]["kl"] < 2 * plain["after"]["kl"]
