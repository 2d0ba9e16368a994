"""Adapters on disk: PEFT's own format, whole or not at all, and never on the wrong base."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.adapters.editing import edit_config, edit_weights, first, logits
from tests.tiny import tiny_model_folder
from tests.training.uniform import QUICK, x_target
from xfactor_peft.adapters.adapter import find_adapter, list_adapters, read_adapter
from xfactor_peft.adapters.fit import check_fits
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.run import FolderOptions, default_name, train_to_folder
from xfactor_peft.tokens.rule import Rule
from xfactor_peft.tokens.token_set import TokenSet

SHORT = TrainOptions(steps=30, seq_len=16, lr=1e-2)


@pytest.fixture
def root(adapters_root):
    return adapters_root


def test_plain_peft_gives_the_same_logits(tiny, root, tiny_folders):
    bank = AdapterBank(tiny, root)
    bank.load("x")
    base = logits(bank.model)
    bank.use("x")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt2"], dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain.eval(), root / "x")
    assert torch.equal(logits(bank.model), logits(plain))
    assert not torch.allclose(base, logits(plain))


def test_folder_holds_everything(root):
    names = {path.name for path in (root / "x").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "xfactor.json", "metrics.jsonl", "README.md"}
    assert not list(root.glob(".*"))
    record = json.loads((root / "x/xfactor.json").read_text())
    lines = [json.loads(line) for line in (root / "x/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == list(range(30))
    assert lines[0]["base"] == record["base"]
    assert record["base"]["name"] in (root / "x/README.md").read_text()
    assert record["base"]["why"] == "a local folder"
    assert record["tokens"]["rule"] == {"kind": "contains", "value": "X", "ignore_case": False}
    assert record["after"]["rate"] > record["before"]["rate"]
    config = json.loads((root / "x/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == record["base"]["name"]
    assert config["fan_in_fan_out"] is True


def test_swap_and_back_is_bit_equal(load_tiny, root):
    bank = AdapterBank(load_tiny(), root)
    base = logits(bank.model)
    for name in ("x", "z"):
        bank.load(name)
    bank.use("x")
    first = logits(bank.model)
    bank.use("z")
    second = logits(bank.model)
    bank.use("x")
    assert torch.equal(logits(bank.model), first)
    with bank.base_only():
        assert torch.equal(logits(bank.model), base)
    assert torch.equal(logits(bank.model), first)
    bank.use(None)
    assert torch.equal(logits(bank.model), base)
    fresh = AdapterBank(load_tiny(), root)
    fresh.load("z")
    fresh.use("z")
    assert torch.equal(logits(fresh.model), second)
    assert not torch.equal(first, second)


def test_scale_moves_between_base_and_adapter(tiny, root):
    bank = AdapterBank(tiny, root)
    base = logits(bank.model)
    bank.load("x")
    tokens = bank.token_set("x")

    def mass(scale):
        bank.use("x", scale)
        return float(logits(bank.model).softmax(-1)[..., tokens.mask()].sum(-1).mean())

    assert mass(0.0) < mass(0.1) < mass(1.0)
    bank.use("x", 0.0)
    torch.testing.assert_close(logits(bank.model), base)
    with pytest.raises(XFactorError, match="finite number"):
        bank.use("x", float("nan"))


def test_generation_follows_the_active_adapter(tiny, root):
    bank = AdapterBank(tiny, root)
    bank.load("x")
    members = set(bank.token_set("x").ids)
    options = SamplingOptions(max_new_tokens=40)
    bank.use("x")
    with_adapter = bank.generate("Once", options)
    assert with_adapter == bank.generate("Once", options)
    bank.use(None)
    without = bank.generate("Once", options)
    share = [sum(i in members for i in ids) / len(ids) for ids in (without, with_adapter)]
    assert share[1] > share[0] + 0.3


@pytest.mark.parametrize("other", ["weights", "family", "tokenizer"])
def test_an_adapter_for_another_base_is_refused(root, tiny_folders, tmp_path, other):
    if other == "weights":
        folder = tiny_model_folder("gpt2", tmp_path / "other", seed=1)
    elif other == "family":
        folder = tiny_folders["llama"]
    else:
        folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "other")
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["model"]["vocab"] = {token: 383 - i for token, i in spec["model"]["vocab"].items()}
        spec["added_tokens"][0]["id"] = 383 - spec["added_tokens"][0]["id"]
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    base = load_base(resolve_model(str(folder)), LoadOptions("fp32"))
    bank, before = AdapterBank(base, root), logits(base.model)
    with pytest.raises(XFactorError, match=r"was made for .*gpt2.*but the model here is") as caught:
        bank.load("x")
    assert str(folder) in str(caught.value)
    assert other == "family" or f"different: {other}" in str(caught.value)
    assert bank.adapters == {}
    assert torch.equal(logits(bank.model), before)
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_the_same_weights_saved_again_are_the_same_base(root, tiny_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt2"], dtype=torch.float32)
    folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "copy")
    stripped = {name.removeprefix("transformer."): p for name, p in model.state_dict().items() if "lm_head" not in name}
    save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})
    bank = AdapterBank(load_base(resolve_model(str(folder)), LoadOptions("bf16")), root)
    assert bank.load("x").name == "x"


def damaged(root, tmp_path, change):
    folder = shutil.copytree(root / "x", tmp_path / "x")
    change(folder)
    return folder


UNREADABLE = "cannot be read as safetensors"
UNKNOWN_LAYER = {"base_model.model.foo.lora_A.weight": torch.zeros(8, 64)}
DAMAGE = {
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08" * 40), UNREADABLE),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "safetensors cannot be read: No such"),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "json list": (lambda f: (f / "xfactor.json").write_text("[]"), "must hold a JSON object"),
    "no identity": (lambda f: (f / "xfactor.json").write_text('{"base": {}}'), "is damaged"),
    "other type": (edit_config(peft_type="IA3"), "only LORA is"),
    "shape": (edit_weights(lambda t: t.update({first(t): torch.zeros(8, 63)})), "does not fit the layer"),
    "nan": (edit_weights(lambda t: t[first(t)].fill_(float("nan"))), "NaN or infinity"),
    "extra key": (edit_weights(lambda t: t.update(UNKNOWN_LAYER)), "no layer foo"),
    "strange key": (edit_weights(lambda t: t.update({"hello": torch.zeros(1)})), "unexpected tensor hello"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapters_change_nothing(tiny, root, tmp_path, kind):
    change, message = DAMAGE[kind]
    folder = damaged(root, tmp_path, change)
    bank = AdapterBank(tiny, root)
    bank.load("z")
    bank.use("z", 0.7)
    before = logits(bank.model)
    with pytest.raises(XFactorError, match=message):
        bank.load(str(folder))
    assert (bank.active, list(bank.adapters)) == (Mix.of("z", 0.7), ["z"])
    assert torch.equal(logits(bank.model), before)


def test_an_adapter_of_plain_peft_loads_without_a_record(tiny, root, tmp_path):
    folder = damaged(root, tmp_path, lambda f: (f / "xfactor.json").unlink())
    info = AdapterBank(tiny, root).load(str(folder))
    assert info.identity is None
    assert info.token_rule is None


def test_existing_output_is_kept(tiny, root, tmp_path):
    with pytest.raises(XFactorError, match="exists; pass `force=True`"):
        train_to_folder(tiny, x_target(tiny), root / "x", Recipe(SHORT, evaluation=QUICK))
    precious = tmp_path / "notes"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(XFactorError, match="`force=True` does not replace it"):
        train_to_folder(
            tiny, x_target(tiny), precious, Recipe(SHORT, evaluation=QUICK), folder=FolderOptions(force=True)
        )
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_run_that_fails_leaves_only_what_is_worth_keeping(load_tiny, tmp_path):
    base = load_tiny()
    with pytest.raises(XFactorError, match="longer than the model's context"):
        train_to_folder(base, x_target(base), tmp_path / "a", Recipe(TrainOptions(seq_len=999), evaluation=QUICK))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(XFactorError, match="lower `lr`"):
        train_to_folder(
            base, x_target(base), tmp_path / "a", Recipe(TrainOptions(lr=1e30, seq_len=8), evaluation=QUICK)
        )
    assert [path.name for path in tmp_path.iterdir()] == [".a.partial"]
    assert '"step": 0' in (tmp_path / ".a.partial/metrics.jsonl").read_text()


def test_force_replaces_a_run(tiny, root, tmp_path):
    folder = shutil.copytree(root / "x", tmp_path / "x")
    train_to_folder(
        tiny,
        x_target(tiny),
        folder,
        Recipe(TrainOptions(steps=2, seq_len=8), evaluation=QUICK),
        folder=FolderOptions(force=True),
    )
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_finding_and_naming(root, tiny):
    assert list_adapters(root) == ["head", "x", "z"]
    assert find_adapter("x", root) == root / "x"
    assert find_adapter(str(root / "z")) == root / "z"
    with pytest.raises(XFactorError, match="there are: head, x, z"):
        find_adapter("nope", root)
    tokens = TokenSet.contains(tiny.tokenizer, "X", ignore_case=True)
    assert default_name(UniformTarget(tokens), TrainOptions(), LoraOptions(r=4)) == "X-any-case-lora-r4"
    ids = TokenSet.token_ids(tiny.tokenizer, [3])
    assert default_name(UniformTarget(ids), TrainOptions(method="full"), LoraOptions()).startswith("token-ids-")


def test_full_fine_tuning_saves_a_whole_model(tiny, tmp_path):
    options = TrainOptions(method="full", steps=3, seq_len=8)
    result, _ = train_to_folder(tiny, x_target(tiny), tmp_path / "full", Recipe(options, evaluation=QUICK))
    again = load_base(resolve_model(str(tmp_path / "full")), LoadOptions("fp32"))
    trained = dict(result.model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in again.model.named_parameters())
    torch.testing.assert_close(logits(again.model), logits(result.model))  # memory lies elsewhere, so not bit by bit
    with pytest.raises(XFactorError, match="a whole model, not an adapter; use it as `model="):
        find_adapter(str(tmp_path / "full"))


def test_reading_a_folder_imports_little(root):
    """Neither PEFT nor what trains; each of the package's modules that it does import is about reading."""
    script = (
        "import sys; from pathlib import Path; from xfactor_peft.adapters.adapter import read_adapter; "
        f"read_adapter(Path({str(root / 'x')!r})); print(*(m for m in sys.modules if m.split('.')[0] in "
        "('xfactor_peft', 'peft')))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = result.stdout.split()
    assert "xfactor_peft.adapters.record" in modules
    assert len(modules) <= 20, modules
    assert "peft" not in modules


def test_a_set_without_a_rule_is_recorded_as_its_ids(tiny, tmp_path):
    """So that the adapter can be read, and its set made again."""
    ids = TokenSet.contains(tiny.tokenizer, "X").ids
    target = UniformTarget(TokenSet(ids, tiny.vocab_size))
    train_to_folder(tiny, target, tmp_path / "ids", Recipe(TrainOptions(steps=1, seq_len=8), evaluation=QUICK))
    assert read_adapter(tmp_path / "ids").token_rule == Rule("token-ids", ids)


def test_read_adapter_touches_no_model(root, tiny):
    info = read_adapter(root / "x")
    check_fits(info, tiny)
    assert info.token_rule.value == "X"
    assert not any("lora" in name for name, _ in tiny.model.named_modules())
