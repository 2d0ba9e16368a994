"""GGUF files in llama.cpp itself: distributions, tokens and `--lora`."""

import json

import pytest
import torch

from tests.bank.loaded import bank_of
from tests.export.llama import LlamaCpp
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.export import export
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import LoadOptions, LoraOptions

pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXT = "The fox and Xavier mixed 12 boxes, isn't it?\n XX<mark>X"
PLACES = (1, 7, 24)


def bent(kind, folder):
    """A tiny model with what exports trip over: head_dim apart from the width, biases that matter, an added token."""
    tiny_model_folder(kind, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "llama":
        config |= {"head_dim": 32, "attention_bias": True, "mlp_bias": True}
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(folder)
    base = load_base(resolve_model(str(folder)), LoadOptions("fp32"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=generator)
    base.tokenizer.add_tokens(["<mark>"])
    base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 0.03), ("llama", 2e-3)])
def test_llama_cpp_gives_the_adapters_distributions(kind, tolerance, tmp_path):
    """llama.cpp looks GELU up in a table of float16, so GPT-2's logits differ by 0.01 with and without an adapter."""
    folder = bent(kind, tmp_path / "model")

    def bank(*names):
        return bank_of(load_base(resolve_model(str(folder)), LoadOptions("fp32")), tmp_path, *names)

    model = add_lora(bank().base.model, LoraOptions(r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapted, ids = bank("a"), torch.randint(0, 380, (1, 24), generator=torch.Generator().manual_seed(0))
    vocabulary = adapted.base.vocab_size
    with torch.no_grad():
        plain = adapted.model(input_ids=ids).logits[0].log_softmax(-1)
        adapted.use("a", 0.8)
        wanted = adapted.model(input_ids=ids).logits[0].log_softmax(-1)
    for mix, name in ((Mix.of("a", 0.8), "merged"), (Mix(), "base")):
        export(bank(*mix.names), mix, "gguf", tmp_path / f"{name}.gguf")
    export(bank("a"), Mix.of("a", 0.8), "gguf-lora", tmp_path / "lora.gguf")
    base = LlamaCpp(tmp_path / "base.gguf", vocabulary)
    merged = LlamaCpp(tmp_path / "merged.gguf", vocabulary)
    with_lora = LlamaCpp(tmp_path / "base.gguf", vocabulary, (tmp_path / "lora.gguf", 1.0))
    assert (wanted - plain).abs().max() > 1
    for place in PLACES:
        seen = ids[0, :place].tolist()
        for program, logits in ((base, plain), (merged, wanted), (with_lora, wanted)):
            torch.testing.assert_close(program.log_probs(seen), logits[place - 1], atol=tolerance, rtol=0)
    assert merged.tokens(TEXT) == adapted.base.tokenizer(TEXT)["input_ids"]
    assert adapted.base.tokenizer.convert_tokens_to_ids("<mark>") in merged.tokens(TEXT)
