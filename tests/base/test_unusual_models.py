"""Models without attention or with a cache that does nothing, ids that have no row, weights that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from tests.architectures import architecture_folder
from tests.base.test_claims import changed, load
from tests.tiny import tiny_tokenizer
from tests.training.uniform import QUICK, x_target
from xfactor_peft import TrainOptions, XFactorError, train
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.base import split_model as split_module
from xfactor_peft.base.split_model import split
from xfactor_peft.budget.dry_run import read_config
from xfactor_peft.lowmem.kv_cache import token_bytes
from xfactor_peft.objective.targets import TiltedTarget
from xfactor_peft.options import ObjectiveOptions, SamplingOptions
from xfactor_peft.sampling.sampler import sample
from xfactor_peft.training.loop import _cause

BRIEF = TrainOptions(steps=2, seq_len=8, batch_size=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")

    def make(name):
        return root / name if (root / name).is_dir() else architecture_folder(name, root / name)

    return make


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv"])
def test_a_model_without_attention_is_refused_by_name_by_loading_and_planning(built, name, run):
    folder = built(name)
    for use in (load, read_config):
        with pytest.raises(XFactorError, match=f"is a {name} model, which has no attention heads"):
            use(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # one that was loaded by other means, as for `XFactorTrainer`
    with pytest.raises(XFactorError, match="with a key-value cache"):
        split(model)
    with pytest.raises(XFactorError, match=f"a {name} model has no attention heads"):
        token_bytes(model.config, torch.float32)
    for command in ("plan", "train", "tokens"):
        assert f"is a {name} model" in " ".join(run(command, "--model", folder, code=2).output.split())


def test_a_cache_that_is_taken_and_dropped_is_noticed(built):
    """GPT-1 takes the argument for one of those that it ignores: samples would forget their context."""
    with pytest.raises(
        XFactorError, match="OpenAIGPTLMHeadModel gives other states with a key-value cache than without"
    ):
        split(load(built("openai-gpt")).model)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"quantization": "int8"}, {"quantization": "nf4"}])
def test_a_cache_that_works_is_not(load_tiny, kind, options, monkeypatch):
    base = load_tiny(kind, **options)
    split(base.model)

    class Forgetful(DynamicCache):
        def update(self, keys, values, *rest, **more):
            return keys, values

    monkeypatch.setattr(split_module, "reserved_cache", lambda config, capacity: Forgetful(config=config))
    with pytest.raises(XFactorError, match="gives other states with a key-value cache"):
        split(base.model)


def test_a_model_that_takes_no_cache_is_refused(tiny, monkeypatch):
    def refuse(*_, **__):
        raise TypeError("unexpected keyword argument 'past_key_values'")

    monkeypatch.setattr(split_module, "reserved_cache", refuse)
    with pytest.raises(TypeError):
        split(tiny.model)  # the cache itself is this package's
    monkeypatch.undo()
    forward = type(tiny.model.base_model).forward

    def no_cache(self, *args, past_key_values=None, **more):
        if past_key_values is not None:
            refuse()
        return forward(self, *args, **more)

    monkeypatch.setattr(type(tiny.model.base_model), "forward", no_cache)
    with pytest.raises(XFactorError, match=r"GPT2LMHeadModel does not run with a key-value cache \(unexpected keyword"):
        split(tiny.model)


def test_layers_whose_weight_is_read_directly_are_not_quantised(built):
    folder = built("jamba")
    with pytest.raises(
        XFactorError, match=r"JambaForCausalLM does not run with quantised layers.*without `quantization`"
    ):
        load(folder, quantization="int8")
    assert load(folder).quantized == {}


@pytest.mark.parametrize("wrong", [[5, 384], [-1], [10**9]])
def test_prompt_ids_without_a_row(tiny, wrong):
    with pytest.raises(XFactorError, match=rf"prompt 1 holds the id {wrong[-1]}, .* from 0 to 383"):
        list(sample(split(tiny.model), [[1, 2], wrong], SamplingOptions(max_new_tokens=2)))
    with pytest.raises(XFactorError, match="prompt 0 holds no token"):
        list(sample(split(tiny.model), [[]], SamplingOptions(max_new_tokens=2)))
    assert len(list(sample(split(tiny.model), [[0, 383]], SamplingOptions(max_new_tokens=2)))) == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_folders, tmp_path):
    folder = changed(tiny_folders["gpt2"], tmp_path / "t")
    tokenizer = tiny_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(XFactorError, match=r"largest id is 384 \('<one more>'\), but the model has 384 rows"):
        load(folder)
    load(tiny_folders["opt"])  # more rows than tokens is usual


def spoiled(folder, path, name, row):
    def nan(tensors):
        tensors[name][row] = math.nan
        return tensors

    return changed(folder, path, nan)


def test_nan_in_the_base_is_the_bases(tiny_folders, tmp_path):
    name = "transformer.h.1.mlp.c_fc.bias"
    base = load(spoiled(tiny_folders["gpt2"], tmp_path / "n", name, 3))
    with pytest.raises(XFactorError, match="gives logits that are not finite before anything is trained") as error:
        train(base, x_target(base), BRIEF, evaluation=QUICK)
    assert "lr" not in str(error.value)


def test_nan_in_a_row_that_comes_up_late_is_the_bases_too(tiny_folders, tmp_path):
    """The embedding of one token, which eight probing tokens do not contain; the loss names the tensor."""
    base = load(spoiled(tiny_folders["llama"], tmp_path / "n", "model.embed_tokens.weight", slice(210, 380)))
    with pytest.raises(
        XFactorError, match=r"step 0: loss nan.*the base's own model.embed_tokens.weight is not"
    ) as error:
        train(base, x_target(base), BRIEF, evaluation=None)
    assert "lr" not in str(error.value)


def test_too_high_a_learning_rate_is_still_blamed(tiny):
    from types import SimpleNamespace

    run = SimpleNamespace(base=tiny)
    assert _cause(run, SimpleNamespace(step=3)) == "lower `lr` or use `dtype=fp32`"
    assert "nothing was updated yet" in _cause(run, SimpleNamespace(step=0))


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float64, 1e300, "holds 1e[+]300, infinity in float32"),
        (torch.float32, 3.4e38, "holds 3.4e[+]38, infinity in bfloat16"),
    ],
)
def test_finite_weights_that_overflow_where_they_are_used(adapters_root, tmp_path, dtype, value, message):
    import shutil

    folder = tmp_path / "x"
    shutil.copytree(adapters_root / "x", folder)
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    read_adapter(folder)  # the negative control: the type alone is no fault
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, path)
    with pytest.raises(XFactorError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("seed", [-1, 2**43, 2**64])
def test_seeds_out_of_range(seed):
    with pytest.raises(XFactorError, match=rf"`seed` must be at least 0 and below 2\^43; got {seed}"):
        TrainOptions(seed=seed)
    if not 0 <= seed < 2**63:
        with pytest.raises(XFactorError, match=r"`seed` must be at least 0 and below 2\^63"):
            SamplingOptions(seed=seed)


def test_the_largest_seed_reaches_every_generator(tiny):
    """A rate draws samples of several kinds, with seeds that are multiples of the run's."""
    options = TrainOptions(steps=2, seq_len=8, batch_size=2, seed=2**43 - 1)
    target = TiltedTarget.of(x_target(tiny).tokens, rate=0.3)
    result = train(
        tiny, target, options, evaluation=QUICK, objective=ObjectiveOptions(sequence_level=True, sequence_steps=1)
    )
    assert result.rate is not None
    sampled = sample(split(tiny.model), [[1, 2]], SamplingOptions(max_new_tokens=2, seed=2**63 - 1))
    assert len(list(sampled)) == 1
