"""A GGUF file says all that its source says, or is refused.

One thing is changed at a time, and what changes the model's logits or the tokenizer's ids has to change the file.
"""

import copy
import json
import shutil

import pytest
import torch

from tests.export.test_llama_cpp import TEXT, bent
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import LoadOptions, LoraOptions

pytest.importorskip("gguf", reason="the extra gguf is not installed")
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {kind: bent(kind, root / kind) for kind in ("gpt2", "llama")}


class Outcome:
    """What transformers makes of a folder, and what the export makes of it: bytes or a refusal."""

    def __init__(self, folder, output):
        base = load_base(resolve_model(str(folder)), LoadOptions("fp32"))
        with torch.no_grad():
            self.logits = base.model(input_ids=IDS).logits
        self.ids = base.tokenizer(TEXT)["input_ids"]
        try:
            export(AdapterBank(base, output.parent), Mix(), "gguf", output, force=True)
            self.file = output.read_bytes()
        except XFactorError as error:
            self.file = None
            self.refusal = str(error)


def changed(folder, tmp_path, edit, name):
    """The outcome after `edit` has changed the JSON file `name`; None where transformers or we refuse the folder."""
    copied = tmp_path / "changed"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    content = json.loads((copied / name).read_text())
    edit(content)
    (copied / name).write_text(json.dumps(content))
    try:
        return Outcome(copied, tmp_path / "source.gguf")
    except Exception:  # whatever transformers raises for a configuration that makes no sense
        return None


def others(value):
    """Other values that a field might have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value + 1]
    if isinstance(value, str):
        return ["gelu", "relu", "linear", "other"]
    return [True, 7] if value is None else []


def config_edits(config):
    for name, value in config.items():
        for other in others(value):
            yield f"{name}={other}", lambda c, n=name, o=other: c.__setitem__(n, o)
    linear = {"rope_type": "linear", "factor": 2.0}
    for name, other in (("attn_logit_softcapping", 5.0), ("residual_multiplier", 2.0), ("scale_attn_weights", False),
                        ("scale_attn_by_inverse_layer_idx", True), ("rope_scaling", linear),
                        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
                        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
                        ("hidden_act", "relu"), ("activation_function", "gelu")):  # fmt: skip
        yield f"{name}={other}", lambda c, n=name, o=other: c.__setitem__(n, o)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_field_that_changes_the_model_changes_the_file_or_is_refused(sources, tmp_path, kind):
    source = sources[kind]
    before = Outcome(source, tmp_path / "source.gguf")
    assert before.file is not None
    moved, refused, silent = 0, 0, []
    for name, edit in config_edits(json.loads((source / "config.json").read_text())):
        after = changed(source, tmp_path, edit, "config.json")
        if after is None or torch.equal(after.logits, before.logits):
            continue
        moved, refused = moved + 1, refused + (after.file is None)
        silent += [name] if after.file in (before.file,) else []
    assert silent == []
    assert moved >= 4
    assert refused >= 2


def tokenizer_edits():
    def model(key, value):
        return lambda spec: spec["model"].__setitem__(key, value)

    digits = {"type": "Digits", "individual_digits": True}
    regex = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}|\s+"}, "behavior": "Isolated", "invert": False}

    def split(*first):
        def edit(spec):
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*first, spec["pre_tokenizer"]]}

        return edit

    def mark(key):
        return lambda spec: spec["added_tokens"][-1].__setitem__(key, True)

    def template(tokens):
        def edit(spec):
            entry = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
            spec["post_processor"] = {
                "type": "TemplateProcessing", "single": [*[entry] * tokens, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }  # fmt: skip

        return edit

    return {
        "lower case": lambda spec: spec.__setitem__("normalizer", {"type": "Lowercase"}),
        "composed": lambda spec: spec.__setitem__("normalizer", {"type": "NFKC"}),
        "a space in front": lambda spec: spec["pre_tokenizer"].__setitem__("add_prefix_space", True),
        "no splitting": lambda spec: spec["pre_tokenizer"].__setitem__("use_regex", False),
        "digits apart": split(digits),
        "an unknown pattern": split(regex),
        "whole words first": model("ignore_merges", True),
        "fewer merges": lambda spec: spec["model"]["merges"].__delitem__(slice(60, None)),
        "a mark that takes spaces": mark("lstrip"),
        "a mark that wants to stand alone": mark("single_word"),
        "one in front": template(1),
        "two in front": template(2),
    }


@pytest.mark.parametrize("name", tokenizer_edits())
def test_a_part_of_the_tokenizer_that_changes_ids_changes_the_file_or_is_refused(sources, tmp_path, name):
    before = Outcome(sources["gpt2"], tmp_path / "source.gguf")
    after = changed(sources["gpt2"], tmp_path, tokenizer_edits()[name], "tokenizer.json")
    assert after is not None
    assert after.file != before.file
    if name in ("digits apart", "fewer merges", "one in front"):  # these a file can say
        assert after.file is not None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tensor_without_a_place_is_refused(sources, tmp_path, kind):
    base = load_base(resolve_model(str(sources[kind])), LoadOptions("fp32"))
    base.model.get_output_embeddings().bias = torch.nn.Parameter(torch.ones(base.vocab_size))
    broken = copy.copy(base)
    layer = base.model.base_model.get_submodule("h.0" if kind == "gpt2" else "layers.0")
    layer.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(XFactorError, match=r"has no place for .*\.0\.gate"):
        export(AdapterBank(broken, tmp_path), Mix(), "gguf", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_more_ends_than_a_file_names_are_refused(sources, tmp_path):
    base = load_base(resolve_model(str(sources["gpt2"])), LoadOptions("fp32"))
    base.model.generation_config.eos_token_id = [0, 5, 6]
    with pytest.raises(XFactorError, match="at most two end tokens"):
        export(AdapterBank(base, tmp_path), Mix(), "gguf", tmp_path / "a.gguf")


def test_an_adapter_keeps_its_biases_or_is_refused(sources, tmp_path):
    base = load_base(resolve_model(str(sources["llama"])), LoadOptions("fp32"))
    model = add_lora(base.model, LoraOptions(r=2))
    config = model.peft_config["default"]
    config.lora_bias = True
    tensors = {
        name.replace(".default", "").replace("lora_B", "lora_B"): p.detach().clone()
        for name, p in model.named_parameters() if "lora_" in name
    }  # fmt: skip
    for name in [name for name in tensors if "lora_B" in name]:
        tensors[name.replace("weight", "bias")] = torch.ones(len(tensors[name]))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    bank = AdapterBank(load_base(resolve_model(str(sources["llama"])), LoadOptions("fp32")), tmp_path)
    bank.load("a")
    with pytest.raises(XFactorError, match="no place for the bias of"):
        export(bank, Mix.of("a"), "gguf-lora", tmp_path / "a.gguf")
