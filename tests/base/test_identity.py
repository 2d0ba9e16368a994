"""The fingerprint covers what the forward pass uses and nothing else; a stored head is used where it differs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.base.test_claims import IDS, LOADERS, changed, load, with_loader
from tests.families import family_folder
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.adapters.fit import check_fits
from xfactor_peft.base.identity import BaseIdentity
from xfactor_peft.errors import XFactorError
from xfactor_peft.lowmem.checkpoint_files import same_values, stored_tensors

ROOT = Path(__file__).parents[2]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder).model(IDS).logits


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return family_folder("llama-tied", tmp_path_factory.mktemp("tied") / "llama")


def with_head(tensors, change):
    """The file of a tied model with an output embedding stored as well."""
    head = tensors["model.embed_tokens.weight"].clone()
    change(head)
    return tensors | {"lm_head.weight": head}


def other(head):
    head[300:] += 0.5  # rows beyond those that a fingerprint samples


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stored_head_of_other_values_is_kept_by_every_loader(tied, tmp_path, loader, monkeypatch):
    folder = changed(tied, tmp_path / "h", lambda t: with_head(t, other))
    options = with_loader(loader, monkeypatch)
    model = load(folder, **options).model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head[:300], embedding[:300])
    assert torch.equal(head[300:], embedding[300:] + 0.5)
    if not options:
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_copy_of_the_embedding_is_tied_under_either_name(tied, tmp_path, loader, monkeypatch):
    both = changed(tied, tmp_path / "b", lambda t: with_head(t, lambda head: None))
    name = "model.embed_tokens.weight"
    head_alone = changed(
        tied, tmp_path / "a", lambda t: {"lm_head.weight" if key == name else key: value for key, value in t.items()}
    )
    expected = load(tied).model.get_input_embeddings().weight
    options = with_loader(loader, monkeypatch)
    for folder in (both, head_alone):
        model = load(folder, **options).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, expected)


def test_a_model_with_a_head_of_its_own_is_saved_and_read_again(tied, tmp_path):
    folder = changed(tied, tmp_path / "h", lambda t: with_head(t, other))
    model = load(folder).model
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.tie_word_embeddings is False


def test_the_head_is_part_of_the_fingerprint_where_it_is_used(tied, tiny_folders, tmp_path):
    plain = load(tied).identity
    copy = changed(tied, tmp_path / "c", lambda t: with_head(t, lambda head: None))
    assert torch.equal(logits(copy), logits(tied))
    assert load(copy).identity.differences(plain) == []

    def first(head):
        head[0] += 0.5

    own = changed(tied, tmp_path / "o", lambda t: with_head(t, first))
    assert not torch.equal(logits(own), logits(tied))
    assert load(own).identity.differences(plain) == ["weights"]
    untied = tiny_folders["llama"]
    changed_head = changed(untied, tmp_path / "u", lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 2})
    assert not torch.equal(logits(changed_head), logits(untied))
    assert load(changed_head).identity.differences(load(untied).identity) == ["weights"]


def test_files_that_the_forward_pass_does_not_use_change_nothing(tiny_folders, tmp_path):
    folder = tiny_folders["llama"]
    plain = load(folder).identity
    more = changed(
        folder, tmp_path / "m", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, more / "adapter_model.safetensors")
    assert torch.equal(logits(more), logits(folder))
    assert load(more).identity.differences(plain) == []
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    for index, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, more / f"part-{index}.safetensors")
    (more / "model.safetensors").unlink()
    index = {name: f"part-{int(place >= 5)}.safetensors" for place, name in enumerate(names)}
    (more / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load(more).identity.differences(plain) == []


def layout(folder: Path, path: Path, change) -> Path:
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def older(config):
    """As transformers 4 wrote it."""
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["rope_scaling"] = None
    for key in ("head_dim", "attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)


def test_the_layout_of_the_configuration_is_not_the_model(tiny_folders, tmp_path):
    folder = tiny_folders["llama"]
    old = layout(folder, tmp_path / "old", older)
    assert torch.equal(logits(old), logits(folder))
    assert load(old).identity.config != load(folder).identity.config
    assert load(old).identity.differences(load(folder).identity) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["rope_parameters"].update(rope_theta=500.0),
        lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0),
        lambda c: c.update(rms_norm_eps=1e-2),
        lambda c: c.update(hidden_act="gelu"),
    ],
)
def test_a_configuration_that_changes_logits_is_another_model(tiny_folders, tmp_path, change):
    folder = tiny_folders["llama"]
    folder_2 = layout(folder, tmp_path / "c", change)
    assert not torch.equal(logits(folder_2), logits(folder))
    assert load(folder_2).identity.differences(load(folder).identity) == ["config"]


def test_records_from_before_fit_as_they_did(tiny_folders):
    """They have neither of the newer fingerprints; the demo model's adapters are such."""
    now = load(tiny_folders["gpt2"]).identity
    before = replace(now, parsed=None, forward=None)
    assert before.differences(now) == now.differences(before) == []
    assert replace(before, weights="0").differences(now) == ["weights"]
    assert replace(before, config="0").differences(now) == ["config"]
    assert replace(now, forward="0").differences(now) == ["weights"]
    assert replace(now, config="0", parsed="0", tokenizer="0").differences(now) == ["config", "tokenizer"]


def test_the_demo_models_fingerprints_are_those_that_its_adapters_recorded():
    base = load("demo")
    for name in ("demo-X", "demo-Z"):
        info = read_adapter(ROOT / "adapters" / name)
        assert isinstance(info.identity, BaseIdentity)
        for key in ("config", "weights", "tokenizer"):
            assert getattr(info.identity, key) == getattr(base.identity, key)
        check_fits(info, base)
        other = replace(info.identity, weights="0", forward="0")  # the second decides where it is recorded
        with pytest.raises(XFactorError, match="was made for"):
            check_fits(replace(info, identity=other), base)


def test_same_values_in_pieces_and_across_types(tmp_path, monkeypatch):
    from xfactor_peft.lowmem import checkpoint_files

    monkeypatch.setattr(checkpoint_files, "PIECE_BYTES", 64)
    values = torch.randn(50, 3)
    last = values.clone()
    last[-1, -1] += 1
    tensors = {"a": values, "b": values.double(), "c": last, "d": values[:49].clone(), "e": values.bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    same = {name for name in "bcde" if same_values(stored["a"], stored[name], torch.float32)}
    assert same == {"b"}
    assert same_values(stored["a"], stored["e"], torch.bfloat16)
