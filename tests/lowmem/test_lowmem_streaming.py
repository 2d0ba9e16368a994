"""Streamed loading gives the model that transformers loads, in less memory, and says what is wrong with files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import KINDS, tiny_model
from xfactor_peft.base.loading import quantized_layers
from xfactor_peft.lowmem.checkpoint_files import stored_tensors
from xfactor_peft.lowmem.int8 import quantize_rows
from xfactor_peft.lowmem.streaming import UnsupportedCheckpoint, load_streaming

IDS = torch.arange(24).view(2, 12)
LAYERS = {"gpt2": 8, "llama": 14, "gpt_neox": 8, "opt": 12}


def state(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_model_as_from_pretrained(tiny_folders, kind, dtype):
    expected = AutoModelForCausalLM.from_pretrained(tiny_folders[kind], dtype=dtype).eval()
    actual = load_streaming(tiny_folders[kind], dtype=dtype)
    assert type(actual) is type(expected)
    assert state(actual).keys() == state(expected).keys()
    for name, tensor in state(expected).items():
        assert torch.equal(state(actual)[name], tensor), name
        assert state(actual)[name].dtype == tensor.dtype, name
    assert torch.equal(actual(IDS).logits, expected(IDS).logits)
    assert actual.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not any(p.requires_grad for p in actual.parameters())
    tied = actual.get_output_embeddings().weight is actual.get_input_embeddings().weight
    assert tied == (expected.get_output_embeddings().weight is expected.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_layers_are_those_of_the_weights(tiny_folders, kind, quantization):
    model = load_streaming(tiny_folders[kind], dtype=torch.bfloat16, quantization=quantization)
    name = {"int8": "Int8Linear", "nf4": "NF4Linear"}[quantization]
    assert quantized_layers(model) == {name: LAYERS[kind]}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    plain = tiny_model(kind)
    for path, module in model.named_modules():
        if type(module).__name__ == name:
            original = plain.get_submodule(path)
            weight = original.weight.T if module.from_conv1d else original.weight
            assert module.from_conv1d == (kind == "gpt2")
            error = (module.dequantize() - weight).norm() / weight.norm()
            assert error < (0.02 if quantization == "int8" else 0.13)
            if quantization == "int8":
                assert torch.equal(module.weight, quantize_rows(weight)[0])


def rewrite(folder, path, change, dtype=None):
    """A copy of a model folder with other tensors."""
    path.mkdir(exist_ok=True)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {k: (v if dtype is None else v.to(dtype)).contiguous() for k, v in tensors.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layout_of_the_hub(tiny_folders, tmp_path, stored):
    """Keys without `transformer.`, causal masks among the weights, no output embedding."""

    def hub(tensors):
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items() if k != "lm_head.weight"}
        masks = {f"h.{n}.attn.{kind}": torch.ones(1, 1, 4, 4) for n in (0, 1) for kind in ("bias", "masked_bias")}
        return tensors | masks

    folder = rewrite(tiny_folders["gpt2"], tmp_path, hub, stored)
    expected = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt2"], dtype=torch.float32).to(stored).float()
    actual = load_streaming(folder, dtype=torch.float32)
    assert torch.equal(actual(IDS).logits, expected.eval()(IDS).logits)
    assert actual.lm_head.weight is actual.transformer.wte.weight


def test_shards(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_streaming(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_tensors_are_read_in_pieces(tiny_folders):
    stored = stored_tensors(tiny_folders["gpt2"])["transformer.wte.weight"]
    pieces = [(rows, values.clone()) for rows, values in stored.pieces(1000)]
    assert len(pieces) > 50
    assert torch.equal(torch.cat([values for _, values in pieces]), stored.read())


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("transformer.h.1.ln_2.bias"), "1 tensors missing, such as transformer.h.1.ln_2.bias"),
        (
            lambda t: t | {"transformer.h.9.x": torch.ones(2)},
            "1 tensors not part of the model, such as transformer.h.9.x",
        ),
        (
            lambda t: t | {"transformer.wpe.weight": torch.ones(3, 64)},
            "1 tensors of the wrong shape or type, such as transformer.wpe.weight",
        ),
        (
            lambda t: t | {"transformer.ln_f.bias": torch.ones(64, dtype=torch.int32)},
            "wrong shape or type, such as transformer.ln_f.bias",
        ),
    ],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_files_that_do_not_fit(tiny_folders, tmp_path, change, message, quantization):
    folder = rewrite(tiny_folders["gpt2"], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_streaming(folder, dtype=torch.float32, quantization=quantization)


def test_transposed_weight_is_noticed_although_its_size_fits(tiny_folders, tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    folder = rewrite(tiny_folders["gpt2"], tmp_path, lambda t: t | {name: t[name].T})
    with pytest.raises(ValueError, match=f"wrong shape or type, such as {name}"):
        load_streaming(folder, dtype=torch.float32, quantization="int8")


def test_damaged_files(tiny_folders, tmp_path):
    whole = (tiny_folders["gpt2"] / "model.safetensors").read_bytes()
    folder = rewrite(tiny_folders["gpt2"], tmp_path, lambda t: t)
    file = folder / "model.safetensors"
    for data, message in (
        (whole[:-100], "outside the file"),
        (b"\xff" * 50, "not a safetensors file"),
        (b"", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]" + bytes(8), "JSON object"),
        ((9).to_bytes(8, "little") + b'{"a": {}}' + bytes(8), "header entry of a is damaged"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_streaming(folder, dtype=torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_streaming(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not a file of that folder"),
        ({"weight_map": {"a": "one.safetensors"}}, "lack 1 tensors of the index, such as a"),
    ],
)
def test_damaged_index(tmp_path, index, message):
    save_file({"b": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        stored_tensors(tmp_path)


def test_what_this_loader_cannot_do_is_told_apart(tiny_folders, tmp_path):
    folder = rewrite(tiny_folders["gpt2"], tmp_path, lambda t: t)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedCheckpoint, match="quantised already"):
        load_streaming(folder, dtype=torch.float32)
    with pytest.raises(ValueError, match="int8, nf4 or None"):
        load_streaming(folder, dtype=torch.float32, quantization="int4")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_at_load_is_the_model_and_its_largest_tensor(tmp_path):
    """A float32 checkpoint of 100 MB becomes about 25 MiB of int8 weights without ever being in memory whole."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8
    )
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    program = f"""
        import sys, torch
        from pathlib import Path
        from xfactor_peft.lowmem.streaming import load_streaming
        from xfactor_peft.lowmem.memory import peak_rss
        from transformers.models.llama import modeling_llama
        before = peak_rss()
        model = load_streaming(Path({str(tmp_path)!r}), dtype=torch.bfloat16, quantization="int8")
        print(peak_rss() - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    ).stdout
    assert float(output.split()[-1]) < size / 4 + 60
    assert size > 110
