"""The bank of adapters: mixes, batches of several adapters, unloading, KV caches, and loads that fail half-way."""

import json
import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.adapters.editing import logits
from xfactor_peft.adapters.mix import Mix, parse_mix, parse_mixes
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import LoraOptions, SamplingOptions

GREEDY = SamplingOptions(max_new_tokens=8, temperature=0)


@pytest.fixture
def bank(tiny, adapters_root):
    bank = AdapterBank(tiny, adapters_root)
    for name in ("x", "z", "head"):
        bank.load(name)
    return bank


def test_any_sequence_of_swaps_is_bit_equal_to_a_fresh_load(bank, load_tiny, adapters_root):
    fresh = {}
    for name in (None, "x", "z", "head"):
        alone = AdapterBank(load_tiny(), adapters_root)
        if name:
            alone.load(name)
        alone.use(name)
        fresh[name] = logits(alone.model)
    for name in ("x", "z", "head", "x", None, "head", "x", None, "z"):
        bank.use(name)
        assert torch.equal(logits(bank.model), fresh[name]), name
        with bank.base_only():
            assert torch.equal(logits(bank.model), fresh[None])
        bank.use(name, 0.0)
        assert torch.equal(logits(bank.model), fresh[None])
        bank.use(Mix((("x", 0.3), ("z", -1.0))))
    bank.unload("x")
    bank.use("z")
    assert torch.equal(logits(bank.model), fresh["z"])
    assert not torch.equal(fresh["x"], fresh["z"])


def test_unloading_leaves_no_trace(bank, tiny):
    bank.use("z")
    bank.unload("x")
    assert bank.active == Mix.of("z")
    bank.unload("z")
    assert bank.active == Mix()
    bank.unload("head")
    assert not any(isinstance(module, LoraLayer) for module in tiny.model.modules())
    assert not hasattr(tiny.model, "peft_config")
    assert bank.model is tiny.model
    with pytest.raises(XFactorError, match="adapter x is not loaded; loaded: none"):
        bank.use("x")
    bank.load("x")
    bank.use("x")


def test_the_fast_switch_sets_what_peft_sets(bank):
    def state():
        layers = [m for m in bank.model.modules() if isinstance(m, LoraLayer)]
        return [(list(m.active_adapters), m.disable_adapters, dict(m.scaling)) for m in layers]

    peft = bank.model
    for name in ("x", "z"):
        bank.use(name)
        fast, got = state(), logits(peft)
        peft.base_model.disable_adapter_layers()
        peft.base_model.enable_adapter_layers()
        peft.set_adapter(bank.peft_names[name], inference_mode=True)
        assert state() == fast
        assert torch.equal(logits(peft), got)
    assert not any(p.requires_grad for p in peft.parameters())


def test_a_mix_adds_the_updates(bank, tiny):
    """Layer by layer: the update of a mix is the weighted sum of the adapters' updates."""
    layer = tiny.model.transformer.h[0].attn.c_attn
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))

    def update(what):
        bank.use(what)
        with torch.no_grad():
            return layer(x) - layer.base_layer(x)

    mixed = update(Mix((("x", 0.7), ("z", 0.3))))
    expected = 0.7 * update("x") + 0.3 * update("z")
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)
    assert (mixed - update("x")).abs().max() > 0.01
    bank.use(Mix((("x", 0.5), ("head", 1.0))))
    x_set = bank.token_set("head").mask()
    with_head = logits(bank.model)
    bank.use("x", 0.5)
    torch.testing.assert_close(with_head - logits(bank.model), 2.0 * x_set.expand_as(with_head), atol=1e-4, rtol=0)


def test_one_batch_with_an_adapter_a_row(bank):
    prompts = ["The fox", "Once upon a time there was", "The fox", "A cat", "The fox"]
    names = ["x", "z", None, "head", "x"]
    bank.use("z", 0.5)
    rows = bank.generate_batch(list(zip(prompts, names, strict=True)), GREEDY)
    assert bank.active == Mix.of("z", 0.5)
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        bank.use(name)
        alone.append(bank.generate(prompt, GREEDY))
    assert rows == alone
    assert rows[0] != rows[2]
    assert bank.generate_batch([("The fox", None), ("A cat", None)], GREEDY)[0] == alone[2]
    assert bank.generate_batch([], GREEDY) == []
    with pytest.raises(XFactorError, match="adapter nope is not loaded"):
        bank.generate_batch([("A", "nope")], GREEDY)


@torch.no_grad()
def test_a_cache_made_under_another_adapter_is_refused(bank, tiny):
    ids, more = torch.arange(6)[None], torch.tensor([[7]])

    def cache(what, scale=1.0):
        bank.use(what, scale)
        return bank.model(input_ids=ids, use_cache=True).past_key_values

    def go_on(made):
        return bank.model(input_ids=more, past_key_values=made, use_cache=True).logits

    whole = bank.model(input_ids=torch.cat([ids, more], 1), use_cache=False).logits[:, -1:]
    made = cache("x")
    assert go_on(made).shape == (1, 1, 384)
    bank.use("x")
    whole = bank.model(input_ids=torch.cat([ids, more], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(go_on(cache("x")), whole, atol=1e-4, rtol=1e-4)
    for then in (Mix.of("z"), Mix.of("x", 0.5), Mix(), Mix((("x", 1.0), ("z", 0.1)))):
        made = cache("x")
        bank.use(then)
        with pytest.raises(XFactorError, match="KV cache was made under other adapters"):
            go_on(made)
        with pytest.raises(XFactorError, match="KV cache was made under other adapters"):
            tiny.model.generate(torch.cat([ids, more], 1), past_key_values=made, max_new_tokens=2)
    made = cache("x")
    bank.unload("x")
    bank.load("x")
    bank.use("x")
    with pytest.raises(XFactorError, match="KV cache"):
        go_on(made)


@torch.no_grad()
def test_a_second_bank_on_the_same_base(tiny, adapters_root):
    first = AdapterBank(tiny, adapters_root)
    first.load("z")
    first.unload("z")
    second = AdapterBank(tiny, adapters_root)
    second.load("x")
    second.use("x")
    made = second.model(input_ids=torch.arange(6)[None], use_cache=True).past_key_values
    second.model(input_ids=torch.tensor([[7]]), past_key_values=made, use_cache=True)
    second.use("x", 0.5)
    with pytest.raises(XFactorError, match="KV cache"):
        second.model(input_ids=torch.tensor([[7]]), past_key_values=made, use_cache=True)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_swapping_on_a_quantised_base(load_tiny, adapters_root, quantization):
    base = load_tiny(quantization=quantization)
    plain = logits(base.model)
    bank = AdapterBank(base, adapters_root)
    for name in ("x", "z"):
        bank.load(name)
    bank.use("x")
    first = logits(bank.model)
    bank.use(Mix((("x", 0.5), ("z", 0.5))))
    bank.use("x")
    assert torch.equal(logits(bank.model), first)
    assert not torch.equal(first, plain)
    with bank.base_only():
        assert torch.equal(logits(bank.model), plain)
    rows = bank.generate_batch([("The fox", "x"), ("The fox", None)], GREEDY)
    alone = bank.generate("The fox", GREEDY)
    bank.use(None)
    assert rows == [alone, bank.generate("The fox", GREEDY)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["layer", "weights", "interrupt"])
def test_a_load_that_fails_half_way_is_taken_back(tiny, adapters_root, monkeypatch, where, first):
    """PEFT is made to fail in its third layer, or after all layers when the weights go in."""
    import peft.peft_model
    import peft.tuners.lora.layer

    bank, base = AdapterBank(tiny, adapters_root), logits(tiny.model)
    if not first:
        bank.load("z")
        bank.use("z", 0.5)
    before, names = logits(bank.model), [name for name, _ in tiny.model.named_modules()]
    error = KeyboardInterrupt if where == "interrupt" else RuntimeError
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(
                peft.peft_model, "set_peft_model_state_dict", lambda *a, **k: (_ for _ in ()).throw(error("disk"))
            )
        else:
            original, calls = LoraLayer.update_layer, []

            def fails(self, *args, **kwargs):
                calls.append(1)
                original(self, *args, **kwargs)
                if len(calls) == 3:
                    raise error("disk")

            patch.setattr(peft.tuners.lora.layer.LoraLayer, "update_layer", fails)
        with pytest.raises(KeyboardInterrupt if where == "interrupt" else XFactorError, match="disk"):
            bank.load("x")
    assert list(bank.adapters) == ([] if first else ["z"])
    assert [name for name, _ in tiny.model.named_modules()] == names
    assert torch.equal(logits(bank.model), before)
    assert hasattr(tiny.model, "peft_config") is not first
    with bank.base_only():
        assert torch.equal(logits(bank.model), base)
    bank.load("x")
    bank.use("x")
    assert not torch.equal(logits(bank.model), base)


def test_weights_and_configuration_must_name_the_same_layers(bank, adapters_root, tmp_path):
    folder = shutil.copytree(adapters_root / "x", tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].remove("mlp.c_fc")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    before = logits(bank.model)
    with pytest.raises(XFactorError, match=r"weights for a layer that its configuration leaves out, .*mlp.c_fc"):
        bank.load(str(folder))
    assert torch.equal(logits(bank.model), before)


def test_a_trained_base_is_refused(tiny):
    add_lora(tiny.model, LoraOptions(r=2))
    with pytest.raises(XFactorError, match="carries an adapter already"):
        AdapterBank(tiny)


def test_how_mixes_are_written(tmp_path):
    assert parse_mix("none") == Mix()
    assert parse_mix("x") == Mix.of("x")
    assert parse_mix("x:0.7+z:0.3") == Mix((("x", 0.7), ("z", 0.3))) == parse_mix(str(parse_mix("x:0.7+z:0.3")))
    assert parse_mix("a+b:2", known=["a+b:2"]) == Mix.of("a+b:2")
    assert parse_mix(f"{tmp_path}:0.5") == Mix.of(str(tmp_path), 0.5)
    assert parse_mixes(["x:0.7", "z:0.3"]) == [parse_mix("x:0.7+z:0.3")]
    assert parse_mixes(["none", "x:0.7", "x", "z:0.3", "x+z"]) == [
        Mix(), parse_mix("x:0.7+z:0.3"), Mix.of("x"), Mix((("x", 1.0), ("z", 1.0)))
    ]  # fmt: skip
    for bad, message in {
        "x:0.7+": "a part has no adapter", "x:much": "'much' is not a weight", "x+x": "in the mix x.x twice",
        "x:inf": "must be a finite number", "none:2": "has no adapter",
    }.items():  # fmt: skip
        with pytest.raises(XFactorError, match=message):
            parse_mix(bad)
