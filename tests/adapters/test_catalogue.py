"""`xfactor adapters`: listing, verifying, renaming, removing, merging and comparing; mixes on the command line."""

import errno
import json
import shutil
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.editing import edit_config, edit_weights, logits
from tests.tiny import tiny_model
from xfactor_peft.adapters.adapter import find_adapter, read_adapter
from xfactor_peft.adapters.catalogue import catalogue, facts, rename_adapter
from xfactor_peft.adapters.combine import combine
from xfactor_peft.adapters.compare import compare
from xfactor_peft.adapters.factors import read_factors
from xfactor_peft.adapters.mix import Mix, parse_mix
from xfactor_peft.adapters.output import write_record
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.bank.merging import merge
from xfactor_peft.bank.norm_fold import fold_logit_bias
from xfactor_peft.bank.verification import FAILED, OK, UNKNOWN, verify, verify_files
from xfactor_peft.cli.common import own_base
from xfactor_peft.errors import XFactorError


@pytest.fixture
def root(adapters_root, tmp_path):
    """Copies of the adapters x, z and head, in ./adapters of the folder that commands run in."""
    return Path(shutil.copytree(adapters_root, tmp_path / "adapters"))


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


@pytest.mark.parametrize("name", ["x", "z", "head"])
def test_sound_adapters_pass_every_check(tiny, adapters_root, name):
    checks = verify(name, tiny, adapters_root)
    assert outcomes(checks) == dict.fromkeys(("files", "sha256", "base", "tokens", "scale 0", "R", "merged"), OK), (
        checks
    )


def test_verify_finds_what_was_tampered_with(load_tiny, root):
    tensors = load_file(root / "x/adapter_model.safetensors")
    key = next(key for key in sorted(tensors) if "lora_B" in key)
    tensors[key] += 1e-3
    save_file(tensors, root / "x/adapter_model.safetensors")
    assert outcomes(verify_files("x", root)[1]) == {"files": OK, "sha256": FAILED}
    edit_config(lora_alpha=160)(root / "z")
    assert "adapter_config.json changed" in verify_files("z", root)[1][-1].detail
    edit_weights(lambda t: t[key].fill_(float("nan")))(root / "x")
    assert outcomes(verify("x", load_tiny(), root)) == {"files": FAILED}

    record = json.loads((root / "head/xfactor.json").read_text())
    record["after"]["interval"] = [0.9, 1.0]
    record["tokens"]["hash"] = "0" * 64
    del record["sha256"]
    (root / "head/xfactor.json").write_text(json.dumps(record))
    found = outcomes(verify("head", load_tiny(), root))
    assert (found["sha256"], found["tokens"]) == (UNKNOWN, FAILED)
    record["tokens"]["hash"] = json.loads((root / "x/xfactor.json").read_text())["tokens"]["hash"]
    (root / "head/xfactor.json").write_text(json.dumps(record))
    found = outcomes(verify("head", load_tiny(), root))
    assert (found["tokens"], found["R"], found["merged"]) == (OK, FAILED, OK)
    (root / "head/xfactor.json").unlink()
    found = outcomes(verify("head", load_tiny(), root))
    assert [name for name, outcome in found.items() if outcome == UNKNOWN] == ["sha256", "base", "tokens", "R"]
    assert outcomes(verify("z", load_tiny("llama"), root))["base"] == FAILED


def test_a_mix_as_an_adapter_is_the_mix(load_tiny, root):
    mix = parse_mix("x:0.7+z:-0.3+head:0.5")
    bank = AdapterBank(load_tiny(), root)
    for name in mix.names:
        bank.load(name)
    bank.use(mix)
    combine(mix, root / "mixed", root)
    again = AdapterBank(load_tiny(), root)
    again.load("mixed")
    again.use("mixed")
    torch.testing.assert_close(logits(again.model), logits(bank.model), atol=1e-4, rtol=1e-4)
    bank.use("x")
    assert (logits(again.model) - logits(bank.model)).abs().max() > 0.1
    assert "0.7 x x" in (root / "mixed/README.md").read_text()
    assert outcomes(verify("mixed", load_tiny(), root))["merged"] == OK


def test_mixes_across_bases_and_dora_are_refused(root):
    record = json.loads((root / "z/xfactor.json").read_text())
    record["base"] |= {"weights": "0" * 64, "forward": "0" * 64}  # another base has neither
    (root / "z/xfactor.json").write_text(json.dumps(record))
    with pytest.raises(XFactorError, match=r"x was made for .*, z for "):
        combine(parse_mix("x+z"), root / "mixed", root)
    edit_config(use_dora=True)(root / "x")
    with pytest.raises(XFactorError, match="is DoRA"):
        combine(Mix.of("x"), root / "mixed", root)
    assert not (root / "mixed").exists()


def test_comparison_of_updates(root):
    """Against whole matrices."""
    infos = [read_adapter(find_adapter(name, root)) for name in ("x", "z")]
    result = compare(*infos)
    updates = [
        {n: f.scaling * f.b @ f.a for n, f in read_factors(info).items()} for info in infos
    ]  # fmt: skip
    shared = sorted(updates[0].keys() & updates[1].keys())
    assert len(shared) == 4
    for name in shared:
        one, two = updates[0][name].flatten(), updates[1][name].flatten()
        assert result.layers[name][0] == pytest.approx(float(one.norm()), rel=1e-4)
        assert result.layers[name][2] == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), abs=1e-4)
    assert compare(infos[0], infos[0]).cosine == pytest.approx(1)
    assert abs(result.cosine) < 0.9
    assert result.settings["rank"] == ("8", "4")


def test_an_update_that_cancels_has_no_norm(root):
    for name in ("copy", "other"):
        shutil.copytree(root / "x", root / name)
    combine(parse_mix("x:0.7+copy:-0.3+other:-0.4"), root / "nothing", root)
    result = compare(read_adapter(root / "nothing"), read_adapter(root / "x"))
    assert result.layers
    assert all(nothing <= 1e-6 * norm for nothing, norm, _ in result.layers.values())


def test_the_base_of_an_adapter_without_a_record_has_its_revision(root):
    edit_config(base_model_name_or_path="someone/model", revision="v2")(root / "x")
    (root / "x/xfactor.json").unlink()
    combine(Mix.of("x", 0.5), root / "half", root)
    flags = {"model": "auto", "revision": None}
    for name in ("x", "half"):
        found = own_base(flags, [name], root)
        assert (found["model"], found["revision"]) == ("someone/model", "v2")
    assert own_base({**flags, "revision": "v3"}, ["x"], root)["revision"] == "v3"
    edit_config(base_model_name_or_path=None)(root / "x")
    assert own_base(flags, ["x"], root) == flags


def test_adapters_for_bases_of_different_sizes(root):
    def widen(tensors):
        for key in tensors:
            if "lora_A" in key:
                tensors[key] = torch.cat([tensors[key]] * 2, dim=1)

    edit_weights(widen)(root / "z")
    (root / "z/xfactor.json").unlink()
    with pytest.raises(XFactorError, match="x and z are for bases of different sizes, see transformer"):
        compare(read_adapter(root / "x"), read_adapter(root / "z"))
    with pytest.raises(XFactorError, match="for bases of different sizes"):
        combine(parse_mix("x+z"), root / "mixed", root)
    assert not (root / "mixed").exists()


def test_targets_as_one_pattern_are_shown_as_they_are(root):
    edit_config(target_modules=r".*attn\.c_attn")(root / "z")
    assert facts(read_adapter(root / "z"))["layers"] == r".*attn\.c_attn"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_a_logit_bias_folds_into_a_layer_norm(kind):
    """Exactly, for any gain and bias of the norm; gains of both signs and a kappa near 0 among them."""
    generator = torch.Generator().manual_seed(0)
    for seed, spread in enumerate((0.0, 1.0)):
        model = tiny_model(kind, seed=seed)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        norm = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)][-1 if kind != "opt" else 0]
        norm.weight.mul_(torch.randn(norm.weight.shape, generator=generator).sign() * 1.5)
        norm.bias.add_(spread * torch.randn(norm.bias.shape, generator=generator))
        before = logits(model)
        bias = torch.randn(before.shape[-1], generator=generator) * 3
        fold_logit_bias(model, bias)
        torch.testing.assert_close(logits(model), before + bias, atol=2e-4, rtol=1e-4)


def test_no_place_for_a_bias_behind_an_rms_norm():
    with pytest.raises(XFactorError, match="no bias in its output embedding and no LayerNorm"):
        fold_logit_bias(tiny_model("llama"), torch.ones(384))


def test_merging_into_quantised_weights_is_refused(load_tiny, root):
    bank = AdapterBank(load_tiny(quantization="int8"), root)
    bank.load("x")
    with pytest.raises(XFactorError, match="load the base unquantised"):
        merge(bank, "x")


def test_the_commands(root, run, tiny_folders):
    assert "contains 'X'" in run("adapters", "list").output
    (root / "z/adapter_model.safetensors").write_bytes(b"")
    listed = " ".join(run("adapters", "list").output.split())
    assert "damaged" in listed
    assert run("adapters", "verify", "z", "--files-only", code=1).output.startswith("files:")
    shutil.rmtree(root / "z")
    shown = run("adapters", "show", "x").output
    assert "steps of 4 x 16" in shown
    assert "sha256" in shown
    verified = run("adapters", "verify", "x", "--dtype", "fp32").output
    assert verified.splitlines()[0].startswith(f"model {tiny_folders['gpt2']}")
    assert verified.count(" ok ") == 7
    assert "x is now adapters/y" in run("adapters", "rename", "x", "y").output
    assert json.loads((root / "y/xfactor.json").read_text())["name"] == "y"
    assert "# y" in (root / "y/README.md").read_text()
    assert "sha256:     ok" in run("adapters", "verify", "y", "--files-only").output
    run("adapters", "merge", "mixed", "y:0.5", "head")
    assert "mixed from:     y:0.5, head:1" in run("adapters", "show", "mixed").output
    assert "exists; pass --force" in run("adapters", "merge", "mixed", "y", code=2).output
    assert "cosine of the updates as a whole" in run("adapters", "diff", "y", "mixed").output
    assert "transformer.h.0.attn.c_attn" in run("adapters", "diff", "y", "mixed").output
    run("adapters", "remove", "y", input="n\n", code=1)
    assert (root / "y").exists()
    run("adapters", "remove", "y", input="y\n")
    assert not (root / "y").exists()
    for words, message in {
        ("show", "nope"): "no such adapter", ("rename", "head", "a/b"): "is no name for an adapter",
        ("rename", "head", "mixed"): "exists", ("remove", "nope", "--yes"): "no such adapter",
        ("remove", str(tiny_folders["gpt2"]), "--yes"): "a whole model", ("merge", "new", "nope"): "no such adapter",
    }.items():  # fmt: skip
        assert message in run("adapters", *words, code=2).output


@pytest.mark.parametrize("recorded", ["x", "theirs"])
def test_a_renamed_adapter_has_its_name_in_its_card(root, recorded):
    record = json.loads((root / "x/xfactor.json").read_text())
    write_record(root / "x", {**record, "name": recorded})
    with (root / "x/README.md").open("ab") as card:
        card.write(b"\xff of somebody's\n")
    rename_adapter("x", "y", root)
    write_record(root / "z", {**record, "name": "y"})
    assert (root / "y/README.md").read_bytes() == (root / "z/README.md").read_bytes() + b"\xff of somebody's\n"


@pytest.mark.parametrize("place", ["files.write_atomically", "catalogue.write_atomically", "catalogue.os.rename"])
def test_an_adapter_that_cannot_be_renamed_is_as_it_was(root, monkeypatch, place):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    function = attrgetter(place.partition(".")[2])(import_module(f"xfactor_peft.adapters.{place.partition('.')[0]}"))
    outcomes = iter([OSError(errno.ENOSPC, "No space left")])

    def full(*arguments):
        for error in outcomes:
            raise error
        return function(*arguments)

    monkeypatch.setattr(f"xfactor_peft.adapters.{place}", full)
    with pytest.raises(XFactorError, match=r"x cannot be renamed \(No space left\); it keeps its name"):
        rename_adapter("x", "y", root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("section", ["tokens", "train", "before", "after", "loss", "target", "sha256", "rate"])
@pytest.mark.parametrize("value", ["missing", None, {}])
def test_every_command_takes_a_record_without_a_section(root, tiny, section, value):
    """Only `base` is needed: such adapters are listed, shown, verified, renamed, mixed and compared as others are."""
    record = json.loads((root / "x/xfactor.json").read_text())
    record[section] = value
    if value == "missing":
        del record[section]
    (root / "x/xfactor.json").write_text(json.dumps(record))
    assert next(entry for entry in catalogue(root) if entry.name == "x").problem is None
    rename_adapter("x", "y", root)
    assert json.loads((root / "y/xfactor.json").read_text()) == {**record, "name": "y"}
    assert "\n# y\n" in (root / "y/README.md").read_text()
    info = read_adapter(root / "y")
    assert facts(info)["rank"] == "8"
    assert compare(info, read_adapter(root / "z")).layers
    combine(parse_mix("y:0.5+z"), root / "mixed", root)
    assert read_adapter(root / "mixed").identity == info.identity
    assert verify_files("y", root)[1][-1].outcome == (UNKNOWN if section == "sha256" else OK)
    bank = AdapterBank(tiny, root)
    bank.load("y")
    assert (bank.token_set("y") is None) == (section == "tokens")


def test_mixes_on_the_command_line(root, run, tiny_folders):
    model = ["--model", tiny_folders["gpt2"], "--dtype", "fp32", "--max-new-tokens", "16"]
    output = run("generate", *model, "--adapter", "none", "--adapter", "x:0.7", "--adapter", "z:0.3", "The fox").output
    titles = [line for line in output.splitlines() if line in ("base", "x:0.7+z:0.3", "x x 0.7", "z x 0.3")]
    assert titles == ["base", "x:0.7+z:0.3"]
    assert "R 0." in output
    assert "contains 'Z'" in output
    scores = run("eval", *model, "--adapter", "x:0.7+z:0.3", "--adapter", "x", "--repeats", "1", "--json", "s.json")
    assert "x:0.7+z:0.3: R of contains 'Z' 0." in scores.output
    columns = json.loads(Path("s.json").read_text())["scores"]
    assert set(columns) == {str(tiny_folders["gpt2"]), "x:0.7+z:0.3", "x"}
    x, mix, base = (columns[name]["set_mass"] for name in ("x", "x:0.7+z:0.3", str(tiny_folders["gpt2"])))
    assert x > mix > base  # the mass: R of 256 tokens has a standard error of 0.015
    assert "a mix has its weights already" in run(
        "generate", *model, "--adapter", "x:0.7+z:0.3", "--rate", "0.1", code=2
    ).output  # fmt: skip
