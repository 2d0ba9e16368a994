"""Adapters for other programs: what is read back gives the adapter's logits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters.editing import IDS, logits
from tests.bank.loaded import bank_of
from tests.conftest import SHORT_EVALUATION
from xfactor_peft.adapters.catalogue import catalogue
from xfactor_peft.adapters.combine import combine
from xfactor_peft.adapters.mix import Mix, parse_mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import FILES, FOLDERS, export
from xfactor_peft.export.logit_bias import write_logit_bias
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import LoraOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet


@pytest.mark.parametrize("text", ["x", "x:0.7+z:0.3", "head", "x+head:0.5"])
def test_a_merged_folder_is_an_ordinary_model(tiny, adapters_root, tmp_path, text):
    mix = parse_mix(text)
    bank = bank_of(tiny, adapters_root, *mix.names)
    base = logits(bank.model)
    bank.use(mix)
    adapted = logits(bank.model)
    line = export(bank, mix, "merged", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), adapted, atol=1e-4, rtol=1e-4)
    assert (logits(plain) - base).abs().max() > 0.1
    tied = plain.lm_head.weight is plain.transformer.wte.weight
    assert tied is plain.config.tie_word_embeddings is ("head" not in mix.names)
    assert ("tied to the input embedding" in line) is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("The fox") == tiny.tokenizer("The fox")
    with pytest.raises(XFactorError, match="exists; pass `force=True`"):
        export(bank, mix, "merged", tmp_path / "out")


def test_dora_on_the_output_embedding_merges_with_its_magnitude(tiny, load_tiny, tmp_path):
    model = get_peft_model(load_tiny().model, LoraConfig(r=2, target_modules=["lm_head", "c_attn"], use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5).add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
            )
    model.save_pretrained(tmp_path / "d", save_embedding_layers=False)
    bank = bank_of(tiny, tmp_path, "d")
    base = logits(bank.model)
    bank.use("d")
    adapted = logits(bank.model)
    export(bank, Mix.of("d"), "merged", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - base).abs().max() > 1


def test_an_adapter_of_an_int8_run_merges_into_the_unquantised_base(load_tiny, tmp_path):
    base = load_tiny(quantization="int8")
    assert base.quantized
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    options = TrainOptions(steps=3, seq_len=8, lr=1e-2)
    train_to_folder(base, target, tmp_path / "q", Recipe(options, LoraOptions(r=2), SHORT_EVALUATION))
    bank = bank_of(load_tiny(), tmp_path, "q")
    bank.use("q")
    adapted = logits(bank.model)
    export(bank, Mix.of("q"), "merged", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), adapted, atol=1e-4, rtol=1e-4)
    quantised = bank_of(load_tiny(quantization="int8"), tmp_path, "q")
    with pytest.raises(XFactorError, match="load the base unquantised"):
        export(quantised, Mix.of("q"), "merged", tmp_path / "not")
    assert not (tmp_path / "not").exists()


def gguf_tensors(path):
    """Fields and tensors of a GGUF file, read by gguf's own reader; shapes in numpy's order."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    return fields, {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}


def test_gguf_of_the_merged_model(tiny, adapters_root, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    bank = bank_of(tiny, adapters_root, "x", "head")
    export(bank, parse_mix("x+head"), "gguf", tmp_path / "m.gguf")
    fields, tensors = gguf_tensors(tmp_path / "m.gguf")
    model = tiny.model
    assert (fields["general.architecture"], fields["gpt2.block_count"], fields["gpt2.context_length"]) == (
        "gpt2",
        2,
        128,
    )
    assert fields["tokenizer.ggml.tokens"][tiny.tokenizer("X")["input_ids"][0]] == "X"
    assert fields["tokenizer.ggml.eos_token_id"] == tiny.tokenizer.eos_token_id
    assert len(fields["tokenizer.ggml.merges"]) > 100
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], model.transformer.h[1].attn.c_attn.weight.T)
    assert torch.equal(tensors["blk.0.ffn_down.bias"], model.transformer.h[0].mlp.c_proj.bias)
    assert torch.equal(tensors["token_embd.weight"], model.transformer.wte.weight)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert torch.equal(tensors["output_norm.bias"], model.transformer.ln_f.bias)
    assert len(tensors) == 2 * 12 + 5


def test_gguf_of_a_tied_model_holds_the_embedding_once(tiny, adapters_root, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    export(bank_of(tiny, adapters_root, "x"), Mix.of("x"), "gguf", tmp_path / "m.gguf")
    assert {"token_embd.weight", "output.weight"} & gguf_tensors(tmp_path / "m.gguf")[1].keys() == {"token_embd.weight"}


def test_gguf_lora_holds_the_update(tiny, adapters_root, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    bank = bank_of(tiny, adapters_root, "x", "z", "head")
    export(bank, parse_mix("x:0.5+z"), "gguf-lora", tmp_path / "a.gguf")
    fields, tensors = gguf_tensors(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 0.0)
    layer = tiny.model.transformer.h[0].attn.c_attn
    expected = 0.5 * layer.get_delta_weight(bank.peft_names["x"]) + layer.get_delta_weight(bank.peft_names["z"])
    update = tensors["blk.0.attn_qkv.weight.lora_b"] @ tensors["blk.0.attn_qkv.weight.lora_a"]
    torch.testing.assert_close(update, expected.T, atol=1e-6, rtol=1e-5)
    assert tensors["blk.0.attn_qkv.weight.lora_a"].shape == (12, 64)
    with pytest.raises(XFactorError, match="set head has no place in a GGUF adapter"):
        export(bank, Mix.of("head"), "gguf-lora", tmp_path / "b.gguf")
    with pytest.raises(XFactorError, match="exists; pass `force=True`"):
        export(bank, Mix.of("x"), "gguf-lora", tmp_path / "a.gguf")


def test_gguf_refuses_what_it_does_not_know(load_tiny, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    with pytest.raises(XFactorError, match=r"GGUF is written for .*, not opt"):
        export(AdapterBank(load_tiny("opt"), tmp_path), Mix(), "gguf", tmp_path / "a.gguf")
    base = load_tiny("llama")
    export(AdapterBank(base, tmp_path), Mix(), "gguf", tmp_path / "l.gguf")
    fields, tensors = gguf_tensors(tmp_path / "l.gguf")
    assert fields["llama.attention.head_count_kv"] == 2
    q = base.model.model.layers[0].self_attn.q_proj.weight
    stored = tensors["blk.0.attn_q.weight"]
    assert torch.equal(stored[0::2][:8], q[:8])  # rows of a head alternate between its two split_model
    assert torch.equal(stored[1::2][:8], q[8:16])


def test_onnx_gives_the_adapters_logits(tiny, adapters_root, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    bank = bank_of(tiny, adapters_root, "x", "head")
    bank.use(parse_mix("x+head"))
    adapted = logits(bank.model)
    export(bank, parse_mix("x+head"), "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input_ids": IDS.numpy()})
    torch.testing.assert_close(torch.tensor(got), adapted, atol=1e-3, rtol=1e-4)
    (short,) = session.run(None, {"input_ids": np.array([[1, 2], [3, 4], [5, 6]])})
    assert short.shape == (3, 2, 384)


def test_the_logit_bias_of_a_set_head_is_the_adapter(tiny, adapters_root, tmp_path):
    bank = bank_of(tiny, adapters_root, "head", "x")
    base = logits(bank.model)
    export(bank, Mix.of("head", 0.75), "logit-bias", tmp_path / "b.json")
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["kind"] == "exact"
    bias = torch.zeros(384)
    for token, value in record["logit_bias"].items():
        bias[int(token)] = value
    assert sorted(map(int, record["logit_bias"])) == list(bank.token_set("head").ids)
    bank.use("head", 0.75)
    torch.testing.assert_close(base + bias, logits(bank.model), atol=1e-5, rtol=0)


def test_the_logit_bias_of_other_adapters_is_fitted_to_its_rate(tiny, adapters_root, tmp_path):
    bank = bank_of(tiny, adapters_root, "x", "z")
    line = write_logit_bias(bank, Mix.of("x", 0.4), tmp_path / "b.json", SHORT_EVALUATION)
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["kind"] == "fitted"
    assert "fitted at R" in line
    assert record["rate_of_bias"] == pytest.approx(record["rate"], abs=0.25)
    assert set(record["logit_bias"].values()) == {round(float(torch.tensor(record["lambda"])), 6)}  # a float32
    assert record["lambda"] > 0.5
    with pytest.raises(XFactorError, match="has 2 token sets; a bias can be fitted to exactly one"):
        write_logit_bias(bank, parse_mix("x+z"), tmp_path / "c.json", SHORT_EVALUATION)


@pytest.mark.parametrize("kind", ["goals", "merged", "merged goals"])
def test_no_logit_bias_is_fitted_to_one_of_several_sets(tiny, adapters_root, tmp_path, kind):
    root = Path(shutil.copytree(adapters_root, tmp_path / "adapters"))
    if kind != "merged":
        sets = [json.loads((root / name / "xfactor.json").read_text())["tokens"] for name in ("x", "z")]
        record = json.loads((root / "x/xfactor.json").read_text())
        record["target"] = {"kind": "tilted", "goals": [{"tokens": tokens, "rate": 0.1} for tokens in sets]}
        (root / "x/xfactor.json").write_text(json.dumps(record))
    if kind != "goals":
        combine(parse_mix("x+z:0.5" if kind == "merged" else "x:0.5"), root / "both", root)
    name = "x" if kind == "goals" else "both"
    bank = bank_of(tiny, root, name)
    with pytest.raises(XFactorError, match=f"{name} has 2 token sets; a bias can be fitted to exactly one"):
        write_logit_bias(bank, Mix.of(name), tmp_path / "b.json", SHORT_EVALUATION)
    assert [tokens.describe() for tokens in bank.token_sets(name)] == ["contains 'X'", "contains 'Z'"]
    assert bank.token_set(name).describe() == "contains 'X'"  # what columns show
    assert "contains 'X'; contains 'Z'" in {entry.tokens for entry in catalogue(root)}


def test_merged_adapters_of_one_set_have_its_logit_bias(tiny, adapters_root, tmp_path):
    root = Path(shutil.copytree(adapters_root, tmp_path / "adapters"))
    combine(parse_mix("x:0.3+head:0.1"), root / "both", root)
    write_logit_bias(bank_of(tiny, root, "both"), Mix.of("both"), tmp_path / "b.json", SHORT_EVALUATION)
    assert json.loads((tmp_path / "b.json").read_text())["tokens"]["rule"]["value"] == "X"


def test_a_missing_package_is_one_line(tiny, adapters_root, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, package in (("gguf", "gguf"), ("gguf-lora", "gguf"), ("onnx", "onnx")):
        bank = bank_of(tiny, adapters_root)
        with pytest.raises(
            XFactorError, match=rf'needs the package {package}: pip install "xfactor-peft\[{package}\]"'
        ):
            export(bank, Mix(), kind, tmp_path / "m")


def test_the_command(run, tiny_folders, adapters_root, tmp_path):
    from xfactor_peft.cli.export import FORMATS as OFFERED

    assert {*FILES, *FOLDERS} == {*OFFERED}
    root = ["--adapters-dir", adapters_root]
    output = run("export", "x", *root).output
    assert output.splitlines()[0].startswith(f"model {tiny_folders['gpt2']} (the base of x), fp32")
    assert Path("exports/x-merged/model.safetensors").is_file()
    assert "exists; pass --force" in run("export", "x", *root, code=2).output
    run("export", "x", *root, "--force")
    assert "exactly the adapter" in run("export", "head", *root, "--format", "logit-bias").output
    assert "no such adapter" in run("export", "nope", *root, code=2).output
    assert "load the base unquantised" in run("export", "x", *root, "--load-in-8bit", "--force", code=2).output
