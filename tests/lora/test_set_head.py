"""The set head in PEFT's own format: same logits after a round trip, tied weights untouched, mixed ranks, scaling."""

import pytest
import torch
from peft import PeftModel

from tests.tiny import KINDS, tiny_model
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.set_head import SetHead, head_name
from xfactor_peft.lora.wrap import adapter_off, add_lora, matched_modules, trainable_parameters
from xfactor_peft.options import LoraOptions

IDS = torch.arange(12)[None]


def members_of(model, sets=2):
    members = torch.zeros(sets, model.get_output_embeddings().weight.shape[0])
    members[0, [3, 5, 7]] = 1
    if sets > 1:
        members[1, [5, 9]] = 1
    return members


def adapted(kind, target="all,head", sets=2):
    model = tiny_model(kind)
    members = members_of(model, sets)
    wrapped = add_lora(model, LoraOptions(r=4, target=target), sets=sets)
    return model, wrapped, SetHead(model.get_output_embeddings(), members)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adds_a_h_plus_b_to_the_sets(kind):
    base = logits(tiny_model(kind))
    model, wrapped, head = adapted(kind)
    assert torch.equal(logits(wrapped), base)
    with torch.no_grad():
        head.direction.normal_(generator=torch.Generator().manual_seed(0))
    head.shift(torch.tensor([1.0, 2.0]))
    states = SplitModel(model).hidden(IDS)
    expected = base + head(states) @ head.members
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(split(model).logits(states), expected, atol=1e-4, rtol=1e-4)
    with adapter_off(wrapped):
        assert torch.equal(logits(wrapped), base)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_it_and_gives_the_same_logits(kind, tmp_path):
    _, wrapped, head = adapted(kind)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    head.shift(torch.tensor([1.0, -2.0]))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    assert torch.equal(logits(plain), logits(wrapped))
    assert not torch.allclose(logits(plain), logits(tiny_model(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_the_tied_input_embedding_stays_as_it_is(kind):
    model, wrapped, head = adapted(kind)
    embedding = model.get_input_embeddings().weight
    assert embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    before = embedding.detach().clone()
    head.shift(torch.ones(2))
    wrapped(input_ids=IDS).logits.sum().backward()
    assert embedding.grad is None
    assert torch.equal(embedding, before)


def test_with_no_direction_it_is_exactly_a_logit_bias():
    model, wrapped, head = adapted("gpt2", "head", 1)
    head.shift(torch.tensor([2.5]))
    with adapter_off(wrapped):
        tilted = SplitModel(model, 2.5 * head.members[0])
        biased = tilted.logits(tilted.hidden(IDS))
    torch.testing.assert_close(logits(wrapped), biased)


def test_scale_moves_the_whole_term():
    _, wrapped, head = adapted("gpt2", "head", 1)
    base = logits(tiny_model("gpt2"))
    head.shift(torch.tensor([2.0]))
    wrapped.base_model.model.lm_head.set_scale("default", 0.5)
    torch.testing.assert_close(logits(wrapped), base + 1.0 * head.members[0])


def test_only_the_direction_trains_and_switching_off_keeps_it_so():
    model, wrapped, _ = adapted("gpt2")
    blocks = trainable_parameters(add_lora(tiny_model("gpt2"), LoraOptions(r=4)))
    width = model.config.n_embd
    assert trainable_parameters(wrapped) == blocks + 2 * width
    with adapter_off(wrapped):
        pass
    assert trainable_parameters(wrapped) == blocks + 2 * width
    with wrapped.disable_adapter():  # the control: PEFT's own way makes B and its bias trainable
        pass
    assert trainable_parameters(wrapped) > blocks + 2 * width


@pytest.mark.parametrize("kind", KINDS)
def test_matched_modules_name_the_head(kind):
    model = tiny_model(kind)
    assert matched_modules(model, "head") == {head_name(model): 1}
    assert matched_modules(model, "all,head") == {**matched_modules(model, "all"), head_name(model): 1}


def test_a_head_without_sets_or_of_another_size_is_refused():
    with pytest.raises(XFactorError, match="needs a rate"):
        add_lora(tiny_model("gpt2"), LoraOptions(target="head"))
    model = tiny_model("gpt2")
    add_lora(model, LoraOptions(target="head"), sets=1)
    with pytest.raises(XFactorError, match="holds 1 sets, not 2"):
        SetHead(model.get_output_embeddings(), members_of(model))
