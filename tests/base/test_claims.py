"""What a checkpoint says is honoured or refused: its quantisation, and every tensor, by every loader alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.tiny import CONTEXT, KINDS, VOCABULARY, WEIGHT_STD, tiny_model, tiny_tokenizer
from xfactor_peft.base import loading
from xfactor_peft.base.claims import stored_quantisation
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.budget.dry_run import read_config
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import LoadOptions

IDS = torch.arange(24).view(2, 12)
LOADERS = {
    "streaming": {},
    "streaming int8": {"quantization": "int8"},
    "fallback": {},
    "fallback nf4": {"quantization": "nf4"},
    "bitsandbytes int8": {"quantization": "int8", "backend": "bitsandbytes"},
    "bitsandbytes nf4": {"quantization": "nf4", "backend": "bitsandbytes"},
}
CLAIMS = {
    "gptq 4 bit": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "awq 4 bit": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "bitsandbytes 8 bit": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "bitsandbytes 4 bit": {"quantization_config": {"load_in_4bit": True}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "a-method-of-next-year": {"quantization_config": {"quant_method": "a-method-of-next-year"}},
    "by an unknown method": {"text_config": {"quantization_config": {}}},
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A model whose experts transformers stacks while loading, which the streaming loader leaves to it."""
    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=CONTEXT, initializer_range=WEIGHT_STD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def changed(folder: Path, path: Path, tensors=lambda t: t, config: dict | None = None) -> Path:
    """A copy of a model folder with other tensors or more in its configuration."""
    shutil.copytree(folder, path)
    save_file(tensors(load_file(folder / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(settings))
    return path


def load(folder: Path | str, **options):
    return load_base(resolve_model(str(folder)), LoadOptions(**{"dtype": "fp32", **options}))


def with_loader(loader: str, monkeypatch) -> dict:
    """The options under which this loader is the one that reads the files."""
    if loader.startswith("fallback"):

        def refuse(*_, **__):
            raise loading.UnsupportedCheckpoint("for the test")

        monkeypatch.setattr(loading, "load_streaming", refuse)
    return LOADERS[loader]


@pytest.mark.parametrize("method", CLAIMS)
@pytest.mark.parametrize("loader", ["streaming", "fallback nf4", "bitsandbytes int8"])
def test_a_quantised_checkpoint_is_refused_by_name(tiny_folders, tmp_path, method, loader, monkeypatch):
    options = with_loader(loader, monkeypatch)
    folder = changed(tiny_folders["llama"], tmp_path / "q", config=CLAIMS[method])
    refusal = rf"is quantised already \({method}\).*give the unquantised model .* as `model`"
    with pytest.raises(XFactorError, match=refusal):
        load(folder, **options)
    with pytest.raises(XFactorError, match=refusal):
        read_config(folder)  # so a plan does not promise it either


def test_plain_checkpoints_claim_nothing():
    for config in ({}, {"quantization_config": None}, {"text_config": {"hidden_size": 4}}, {"vision_config": None}):
        assert stored_quantisation(config) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind):
    """Of some families transformers loads an empty one, which would drop every prompt; of others it raises."""
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(XFactorError, match=r"no usable tokenizer in .*; save it there with tokenizer\."):
        load(tmp_path)


def test_a_real_4_bit_checkpoint_is_refused_with_and_without_its_claim(tiny_folders, tmp_path):
    """bitsandbytes' own file: without its claim its codes are tensors that do not fit."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"], quantization_config=config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(XFactorError, match=r"is quantised already \(bitsandbytes 4 bit\)"):
        load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(XFactorError, match="tensors not part of the model"):
        load(tmp_path)


DAMAGES = {
    "missing": (lambda t, name: {k: v for k, v in t.items() if k != name}, "1 tensors missing, such as {}"),
    "left over": (lambda t, name: t | {"model.more": torch.ones(2)}, "1 tensors not part of the model"),
    "shape": (lambda t, name: t | {name: torch.ones(3, 5)}, "1 tensors of the wrong shape.*such as {}"),
    "type": (lambda t, name: t | {name: t[name].to(torch.int8)}, "1 tensors of .*type.*, such as {}"),
    "fp8": (lambda t, name: t | {name: t[name].to(torch.float8_e4m3fn)}, "1 tensors of .*type.*, such as {}"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_every_loader_refuses_the_same_files(tiny_folders, tmp_path, loader, damage, name, monkeypatch):
    change, message = DAMAGES[damage]
    options = with_loader(loader, monkeypatch)
    folder = changed(tiny_folders["llama"], tmp_path / "d", lambda t: change(t, name))
    with pytest.raises(XFactorError, match=message.format(name)) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_takes_whole_files(tiny_folders, loader, monkeypatch):
    """The negative control: the same model comes out of all, within the quantisation's error."""
    plain = load(tiny_folders["llama"]).model
    options = with_loader(loader, monkeypatch)
    model = load(tiny_folders["llama"], **options).model
    distance = (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    assert distance < {None: 1e-6, "int8": 0.1, "nf4": 0.7}[options.get("quantization")]  # another model's is 1.4


EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
ALL = ".block_sparse_moe.experts."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != EXPERT}, "such as experts, are missing or do not fit"),
        (lambda t: {k: v for k, v in t.items() if "0.block_sparse_moe.experts.3" not in k}, "wrong shape|do not fit"),
        (lambda t: {k: v for k, v in t.items() if ALL not in k}, "4 tensors missing, such as model.layers.0.mlp"),
        (lambda t: t | {EXPERT: torch.ones(5, 5)}, "such as experts, are missing or do not fit"),
        (lambda t: t | {EXPERT: t[EXPERT].T.contiguous()}, "such as experts, are missing or do not fit"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "1 tensors missing, such as model.norm"),
        (lambda t: t | {EXPERT: t[EXPERT].to(torch.int8)}, f"not floating point, such as {EXPERT}"),
    ],
)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_experts_are_whole_or_refused(mixtral, tmp_path, change, message, quantization):
    with pytest.raises(XFactorError, match=message):
        load(changed(mixtral, tmp_path / "d", change), quantization=quantization)


def test_whole_experts_are_read_bit_for_bit(mixtral):
    expected = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)(IDS).logits
    assert torch.equal(load(mixtral).model(IDS).logits, expected)
