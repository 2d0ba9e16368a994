"""Families that GGUF files are read of, each as a tiny random model: as transformers and llama.cpp have it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bank.loaded import bank_of
from tests.base.gguf_models import CONFIGS, random_model, write_gguf
from tests.tiny import VOCABULARY
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.gguf_config import config_of
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.options import LoadOptions, LoraOptions

pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module", params=CONFIGS)
def source(request, tmp_path_factory):
    """A random model and its file."""
    model = random_model(request.param)
    return model, write_gguf(tmp_path_factory.mktemp(request.param) / "model.gguf", model)


def load(path):
    return load_base(resolve_model(str(path)), LoadOptions("fp32"))


IDS = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_file_is_the_model_it_was_made_from(source):
    """On texts longer than a window; also where the model is split, and with a cache."""
    model, path = source
    base, wanted = load(path), model(input_ids=IDS).logits
    torch.testing.assert_close(base.model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    parts = split(base.model)
    torch.testing.assert_close(parts.logits(parts.hidden(IDS)), wanted, atol=1e-4, rtol=1e-4)
    first = base.model(input_ids=IDS[:, :30], use_cache=True)
    rest = base.model(input_ids=IDS[:, 30:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, wanted[:, 30:], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_transformers_reads_the_same_weights(source):
    """With our configuration: its own overlooks widths of heads, windows and scaled positions."""
    model, path = source
    if model.config.num_hidden_layers == 62:
        pytest.skip("transformers needs a minute for so many tensors")
    config = config_of(read_gguf(path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, config=config)
    wanted = theirs.eval()(input_ids=IDS).logits
    torch.testing.assert_close(load(path).model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_llama_cpp_reads_it_so_and_runs_the_adapter(source, tmp_path):
    """llama.cpp looks GELU up in a table of float16, so that Gemma's logits differ by 0.01."""
    from tests.export.llama import LlamaCpp

    _, path = source
    base = load(path)
    plain = base.model(input_ids=IDS).logits[0].log_softmax(-1)
    adapted = add_lora(base.model, LoraOptions(r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    bank = bank_of(load(path), tmp_path, "a")
    bank.use("a")
    wanted = bank.model(input_ids=IDS).logits[0].log_softmax(-1)
    export(bank, Mix.of("a"), "gguf-lora", tmp_path / "lora.gguf")
    assert (wanted - plain).abs().max() > 0.3
    programs = LlamaCpp(path, VOCABULARY), LlamaCpp(path, VOCABULARY, (tmp_path / "lora.gguf", 1.0))
    for place in (1, 9, 40):
        seen = IDS[0, :place].tolist()
        for program, logits in zip(programs, (plain, wanted), strict=True):
            torch.testing.assert_close(program.log_probs(seen), logits[place - 1], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"final_logit_softcapping": 30.0}, (), "gemma3.final_logit_softcapping is a field that is not known"),
        ({"attn_logit_softcapping": 50.0}, (), "attn_logit_softcapping is a field that is not known"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, (), "rope.scaling.type is yarn"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, (), "rope.scaling.factor is 4.0, which is not"),
        ({"rope.scaling.factor": float("nan")}, (), "rope.scaling.factor is nan"),
        ({"attention.sliding_window_pattern": 0}, (), "sliding_window_pattern is 0"),
        ({"attention.head_count": 3}, (), "not a multiple of the number of attention heads"),
        ({"attention.key_length": 31, "attention.value_length": 31}, (), "sizes do not fit together: .* even"),
        ({"attention.value_length": 16}, (), "attention.value_length is 16"),
        ({}, ("rope_freqs.weight",), "'rope_freqs.weight' is not known of gemma3"),
        ({}, ("blk.0.attn_q.bias",), "attn_q.bias has no place"),
    ],
)
def test_what_cannot_be_honoured_of_gemma_is_refused_by_name(changed, more, message, tmp_path):
    model = random_model("gemma3")
    with pytest.raises(XFactorError, match=message):
        load(write_gguf(tmp_path / "x.gguf", model, changed, more))


@torch.no_grad()
@pytest.mark.parametrize("changed", [{"attention.sliding_window_pattern": 2}, {"rope.freq_base_swa": 500.0}])
def test_fields_that_few_files_of_gemma_have_change_the_model(changed, tmp_path):
    model = random_model("gemma3")
    plain, other = (load(write_gguf(tmp_path / f"{len(c)}.gguf", model, c)).model for c in ({}, changed))
    assert (plain(input_ids=IDS).logits - other(input_ids=IDS).logits).abs().max() > 1e-2
