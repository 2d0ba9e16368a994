"""Exports from a GGUF base: merged into the file's own tensors, and as a folder for Ollama."""

import re

import pytest
import torch

from tests.bank.loaded import bank_of
from tests.tiny import tiny_model_folder, tiny_tokenizer
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.export.gguf_copy import copy_gguf, packed
from xfactor_peft.export.ollama import go_template
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.lowmem.gguf_formats import BY_NAME
from xfactor_peft.options import LoadOptions, LoraOptions

pytest.importorskip("gguf", reason="the extra gguf is not installed")
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<s>system\nBe kind<e>\n' }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '<e>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def load(path):
    return load_base(resolve_model(str(path)), LoadOptions("fp32"))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def packed_base(request, tmp_path_factory):
    """A folder with base.gguf, in Q8_0 and Q4_1, and adapters: "a" on attention and MLP, "head" on the output."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model_folder(request.param, root / "model")
    export(bank_of(load(root / "model"), root), Mix(), "gguf", root / "plain.gguf")
    plain = read_gguf(root / "plain.gguf")
    forms = {
        name: BY_NAME["Q4_1" if "ffn" in name else "Q8_0"]
        for name, tensor in plain.tensors.items()
        if len(tensor.shape) > 1 and "position" not in name
    }
    changed = {name: packed(plain.tensors[name], plain.tensors[name].unpacked(torch.float32), form)
               for name, form in forms.items()}  # fmt: skip
    copy_gguf(plain, root / "base.gguf", changed)
    for name, target in (("a", "all"), ("head", "head")):
        base = load(root / "base.gguf")
        if target == "head":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(base.model, LoraConfig(r=1, target_modules=["lm_head"], lora_alpha=1))
        else:
            model = add_lora(base.model, LoraOptions(r=2, target="attention"))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(key)))
            if "lora_B" in key and target == "head":
                parameter.data[9:] = 0
        model.save_pretrained(root / name, save_embedding_layers=False)
    return root


@torch.no_grad()
@pytest.mark.parametrize(("name", "tensors"), [("a", "same"), ("a", "f16"), ("head", "same")])
def test_what_an_adapter_does_not_touch_stays_byte_for_byte(packed_base, name, tensors, tmp_path):
    bank, output = bank_of(load(packed_base / "base.gguf"), packed_base, name), tmp_path / "merged.gguf"
    bank.use(name)
    ids = torch.arange(3, 27)[None]
    wanted, plain = bank.model(input_ids=ids).logits, load(packed_base / "base.gguf").model(input_ids=ids).logits
    line = export(bank, Mix.of(name), "gguf", output, tensors=tensors)
    cost = float(re.search(r"packing costs KL ([\d.e-]+)", line)[1])
    before, after = read_gguf(packed_base / "base.gguf"), read_gguf(output)
    assert after.header == before.header
    touched = {n for n, t in after.tensors.items()
               if n not in before.tensors or not torch.equal(t.data, before.tensors[n].data)}  # fmt: skip
    if name == "head":
        assert touched <= {"output.weight"}
        old = before.tensors.get("output.weight", before.tensors["token_embd.weight"])
        rows = (after.tensors["output.weight"].data != old.data).any(1).nonzero().flatten()
        assert 0 < len(rows) <= 9
        assert torch.equal(after.tensors["token_embd.weight"].data, before.tensors["token_embd.weight"].data)
    else:
        assert touched
        assert all("attn" in n for n in touched)
    form = "F16" if tensors == "f16" else "Q8_0"
    assert {after.tensors[n].form.name for n in touched} == {form}
    got = load(output).model(input_ids=ids).logits

    def distance(a, b):
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    assert distance(wanted, got) < (1e-4 if tensors == "f16" else 0.03)
    assert distance(wanted, got) < 0.1 * distance(wanted, plain)  # and not the base again
    assert cost < (1e-3 if tensors == "f16" else 0.1)


def test_a_copy_is_the_same_file(packed_base, tmp_path):
    copy_gguf(read_gguf(packed_base / "base.gguf"), tmp_path / "copy.gguf", {})
    assert (tmp_path / "copy.gguf").read_bytes() == (packed_base / "base.gguf").read_bytes()


def test_tensors_are_for_gguf_from_gguf(packed_base, tmp_path):
    bank = bank_of(load(packed_base / "base.gguf"), packed_base, "a")
    with pytest.raises(XFactorError, match="`tensors` says how"):
        export(bank, Mix.of("a"), "gguf-lora", tmp_path / "x.gguf", tensors="f16")


def conversation(template, system, *turns):
    """What Ollama makes of `template`: turn after turn, each with the system's message before the first prompt."""
    said, asked, behind = re.fullmatch(
        r"\{\{ if \.System \}\}(.*)\{\{ end \}\}\{\{ if \.Prompt \}\}(.*)\{\{ end \}\}\{\{ \.Response \}\}(.*)",
        template, re.S,
    ).groups()  # fmt: skip
    text = said.replace("{{ .System }}", system) if system else ""
    for question, answer in zip(turns[::2], [*turns[1::2], None], strict=False):
        text += asked.replace("{{ .Prompt }}", question)
        text += "" if answer is None else answer + behind
    return text


def test_ollamas_template_writes_what_the_tokenizers_own_does():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    template, system = go_template(tokenizer)
    assert system == "Be kind"
    for told, turns in ((system, ("Hi",)), ("Be rude", ("Hi", "Ho", "Why?")), (system, ("A", "B", "C", "D", "E"))):
        messages = [{"role": "system", "content": told}] if told != system else []
        messages += [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 3, turns, strict=False)]
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert conversation(template, told, *turns) == own
    tokenizer.chat_template = CHATML.replace("<e>' + '\n' }}{% endfor", "<e>' + loop.index|string }}{% endfor")
    assert go_template(tokenizer) is None  # what a turn of Ollama's cannot say
    tokenizer.chat_template = None
    assert go_template(tokenizer) == ("{{ .Prompt }}", "")


def test_a_folder_for_ollama(packed_base, tmp_path, run):
    output = tmp_path / "x"
    words = ["--format", "ollama", "--output", output, "--model", packed_base / "base.gguf"]
    assert "ollama create" in run("export", "a", "--adapters-dir", packed_base, *words).output
    lines = (output / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {(packed_base / 'base.gguf').resolve()}", "ADAPTER ./adapter.gguf"]
    assert 'TEMPLATE """{{ .Prompt }}"""' in lines
    assert read_gguf(output / "adapter.gguf").fields["general.type"] == "adapter"
    line = run(
        "export", "a", "--adapters-dir", packed_base, *words[:4], "--model", packed_base / "model", code=2
    ).output
    assert "a Modelfile names a GGUF file" in line
