"""GGUF files in llama.cpp itself: logits, tokens and `--lora`. Skipped where llama-cpp-python is not installed."""

import ctypes

import numpy as np
import pytest
import torch

from tests.bank.loaded import bank_of
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.export import export
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import LoadOptions, LoraOptions

llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXT = "The fox and Xavier mixed 12 boxes, isn't it?\n XX"


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 0.03), ("llama", 1e-3)])
def test_llama_cpp_gives_the_adapters_logits(kind, tolerance, tmp_path):
    """llama.cpp looks GELU up in a table of float16, so GPT-2's logits differ by 0.01 with and without an adapter."""
    folder = tiny_model_folder(kind, tmp_path / "model")

    def bank(*names):
        return bank_of(load_base(resolve_model(str(folder)), LoadOptions("fp32")), tmp_path, *names)

    model = add_lora(bank().base.model, LoraOptions(r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapted, ids = bank("a"), torch.randint(0, 384, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = adapted.model(input_ids=ids).logits[0].numpy()
        adapted.use("a", 0.8)
        wanted = adapted.model(input_ids=ids).logits[0].numpy()
    for kind_of_file, mix, name in (("gguf", Mix.of("a", 0.8), "merged"), ("gguf", Mix(), "base")):
        export(bank(*mix.names), mix, kind_of_file, tmp_path / f"{name}.gguf")
    export(bank("a"), Mix.of("a", 0.8), "gguf-lora", tmp_path / "lora.gguf")
    merged, tokens = run_llama(tmp_path / "merged.gguf", ids[0].tolist(), plain.shape[1])
    base, _ = run_llama(tmp_path / "base.gguf", ids[0].tolist(), plain.shape[1])
    with_lora, _ = run_llama(tmp_path / "base.gguf", ids[0].tolist(), plain.shape[1], tmp_path / "lora.gguf")
    assert abs(wanted - plain).max() > 1
    assert abs(base - plain).max() < tolerance
    assert abs(merged - wanted).max() < tolerance
    assert abs(with_lora - wanted).max() < tolerance
    assert tokens == adapted.base.tokenizer(TEXT)["input_ids"]


def run_llama(path, ids, vocabulary, lora=None):
    """Logits (len(ids), V) of llama.cpp, and its tokens of TEXT."""
    parameters = llama.llama_model_default_params()
    parameters.use_mmap = False
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_threads = 128, 64, 1
    parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0  # a KV cache in float32, plain attention
    context = llama.llama_init_from_model(model, parameters)
    if lora:
        adapter = llama.llama_adapter_lora_init(model, str(lora).encode())
        llama.llama_set_adapters_lora(context, (type(adapter) * 1)(adapter), 1, (ctypes.c_float * 1)(1.0))
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    rows = [llama.llama_get_logits_ith(context, i) for i in range(len(ids))]
    logits = np.stack([np.ctypeslib.as_array(row, (vocabulary,)).copy() for row in rows])
    tokens, text = (ctypes.c_int32 * 100)(), TEXT.encode()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), text, len(text), tokens, 100, False, False)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits, list(tokens[:count])
