"""The checkpoint writer keeps the layout of the Hub's gpt2 files, key by key."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tiny import EOS, tiny_tokenizer
from tools import make_checkpoint
from tools.make_checkpoint import CHUNK, SHAPES, Shape, tensors, values, write_checkpoint

BLOCK = {
    "attn.bias": (1, 1, 128, 128),
    "attn.c_attn.weight": (64, 192),
    "attn.c_attn.bias": (192,),
    "attn.c_proj.weight": (64, 64),
    "attn.c_proj.bias": (64,),
    "ln_1.weight": (64,),
    "ln_1.bias": (64,),
    "ln_2.weight": (64,),
    "ln_2.bias": (64,),
    "mlp.c_fc.weight": (64, 256),
    "mlp.c_fc.bias": (256,),
    "mlp.c_proj.weight": (256, 64),
    "mlp.c_proj.bias": (64,),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **options):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def test_hub_layout_key_by_key(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_checkpoint(tmp_path, "tiny", tokenizer=tokenizer_folder)
    expected = {"wte.weight": (384, 64), "wpe.weight": (128, 64), "ln_f.weight": (64,), "ln_f.bias": (64,)}
    for block in range(2):
        expected |= {f"h.{block}.{key}": size for key, size in BLOCK.items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a handle is no dict
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == expected
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found["h.1.attn.bias"][0, 0], torch.ones(128, 128).tril())


@pytest.mark.parametrize(
    ("shape", "parameters", "data_bytes"),
    [("gpt2", 124_439_808, 548_090_880), ("gpt2-medium", 354_823_168, 1_519_955_968)],
)
def test_full_shapes_have_the_published_sizes(shape: str, parameters: int, data_bytes: int) -> None:
    entries = tensors(SHAPES[shape], "hub")
    assert sum(entry.count for entry in entries if entry.kind != "mask") == parameters
    assert sum(entry.count for entry in entries) * 4 == data_bytes


@pytest.mark.parametrize(("shape", "parameters"), [("llama-3.2-1b", 1_235_814_400), ("qwen2.5-0.5b", 494_032_768)])
def test_other_families_have_the_published_sizes_and_every_tensor(shape: str, parameters: int) -> None:
    entries = {entry.key: entry.size for entry in tensors(SHAPES[shape], "hub")}
    assert sum(map(math.prod, entries.values())) == parameters
    settings = make_checkpoint.config(SHAPES[shape], 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == entries


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families_load_whole_and_in_their_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(SHAPES, "small", Shape(64, 2, 4, 128, 300, family, groups=2, inner=96, dtype="bfloat16"))
    model = load(write_checkpoint(tmp_path, "small"))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_tensors_are_made_in_small_pieces() -> None:
    embedding = next(entry for entry in tensors(SHAPES["gpt2-medium"], "hub") if entry.key == "wte.weight")
    first = next(values(embedding, torch.Generator()))
    assert first.numel() == CHUNK < embedding.count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_it_whole(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, "tiny", dtype=dtype)
    model = load(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.task_specific_params["text-generation"]["max_length"] == 50
    as_bf16 = load(tmp_path, dtype=torch.bfloat16)
    assert as_bf16.dtype == torch.bfloat16
    assert torch.isfinite(as_bf16(torch.tensor([[1, 2, 3]])).logits).all()


def test_both_layouts_hold_the_same_model(tmp_path: Path) -> None:
    hub = write_checkpoint(tmp_path / "hub", "tiny", layout="hub", seed=3)
    modern = write_checkpoint(tmp_path / "modern", "tiny", layout="transformers", seed=3)
    keys = load_file(modern / "model.safetensors").keys()
    assert all(key.startswith("transformer.") and not key.endswith(".attn.bias") for key in keys)
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(load(hub)(ids).logits, load(modern)(ids).logits)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = [write_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in files)
    assert first == same
    assert first != other


def test_gpt2_initialisation(tmp_path: Path) -> None:
    weights = load_file(write_checkpoint(tmp_path) / "model.safetensors")
    assert weights["wte.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.02)
    assert torch.equal(weights["ln_f.weight"], torch.ones(64))
    wide = load_file(write_checkpoint(tmp_path, std=0.4) / "model.safetensors")
    assert wide["wte.weight"].std().item() == pytest.approx(0.4, rel=0.02)


def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_checkpoint(tmp_path, "tiny", tokenizer=tokenizer_folder)
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert config["vocab_size"] == len(tokenizer) == 384
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids(EOS) == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("An X-ray of a fox")["input_ids"]) == "An X-ray of a fox"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in it"):
        write_checkpoint(tmp_path / "out", "tiny", tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "model"), "--shape", "tiny", "--layout", "hub"]
    first = CliRunner().invoke(make_checkpoint.main, arguments)
    assert first.exit_code == 0, first.output
    assert "random weights" in first.output
    assert "NOT a pretrained model" in (tmp_path / "model" / "RANDOM_WEIGHTS.txt").read_text()
    again = CliRunner().invoke(make_checkpoint.main, arguments)
    assert again.exit_code == 2
    assert "already holds files" in again.output
    assert CliRunner().invoke(make_checkpoint.main, [*arguments, "--force"]).exit_code == 0
    assert not list((tmp_path / "model").glob("*.partial"))
