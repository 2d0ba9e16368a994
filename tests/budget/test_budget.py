"""Predictions of memory and time, and what follows from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import KINDS
from xfactor_peft import LoraOptions, MemoryOptions, TokenSet, TrainOptions, UniformTarget, XFactorError, train
from xfactor_peft.base.hardware import pick_dtype
from xfactor_peft.base.split_model import SplitModel
from xfactor_peft.budget.dry_run import Shape, measure_step
from xfactor_peft.budget.memory_model import blocks_to_recompute, predict
from xfactor_peft.budget.plan import chosen_blocks, make_plan, require_fit
from xfactor_peft.cli.run_options import parse_size
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.lowmem.activations import checkpointed_blocks, prepare_for_training
from xfactor_peft.options import EvalOptions, SamplingOptions
from xfactor_peft.sampling.sampler import cache_limit, tokens_at_once

ROOT = Path(__file__).parents[2]
SHAPE = Shape("fp32", None, 4, 32, "lora", LoraOptions())
QUICK = EvalOptions(prompts=("Once upon a time",), repeats=1, sampling=SamplingOptions(max_new_tokens=4))


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("900 MiB", 900 * 2**20), ("1.5G", 1_500_000_000), ("512mb", 512_000_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1", "GiB", "-1GiB", "1 TB2", "lots"])
def test_what_is_no_size_says_so(text):
    with pytest.raises(XFactorError, match="is not a size; write for example 1GiB"):
        parse_size(text)


@pytest.mark.parametrize("options", [{"checkpointing": "maybe"}, {"checkpointing": -1}, {"budget": 0}])
def test_bad_memory_options(options):
    with pytest.raises(XFactorError, match=r"`(checkpointing|memory\.budget)` must be"):
        MemoryOptions(**options)


def really_saved(base, *, ours: bool = True) -> dict[int, int]:
    """Bytes that each block of a real model saves in a real forward pass."""
    model = add_lora(base.model, LoraOptions())
    if ours:
        prepare_for_training(base.model)
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved, place, alive = defaultdict(int), [None], []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if place[0] is not None and storage.data_ptr() not in kept:
            kept.add(storage.data_ptr())
            saved[place[0]] += storage.nbytes()
            alive.append(tensor)
        return tensor

    for index, block in enumerate(checkpointed_blocks(base.model)):
        block.register_forward_pre_hook(lambda *_, index=index: place.__setitem__(0, index))
        block.register_forward_hook(lambda *_: place.__setitem__(0, None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.model.train().base_model(input_ids=torch.zeros(4, 32, dtype=torch.long), use_cache=False)
    return saved


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_counts_what_a_real_step_saves(load_tiny, kind, quantization):
    base = load_tiny(kind, quantization=quantization)
    step = measure_step(base.model.config, replace(SHAPE, quantization=quantization))
    saved = really_saved(base)
    assert len(step.blocks) == 2
    assert step.blocks[1] == pytest.approx(saved[1], rel=0.02)
    assert step.weights == sum({t.untyped_storage().data_ptr(): t.nbytes for t in frozen(base.model)}.values())


def frozen(model):
    return [t for n, t in (*model.named_parameters(), *model.named_buffers()) if "lora_" not in n]


def test_plain_activations_would_be_noticed(load_tiny):
    """The control of the test above: with transformers' own GELU a block saves far more than the dry run says."""
    base = load_tiny()
    step = measure_step(base.model.config, SHAPE)
    assert really_saved(base, ours=False)[1] > 1.2 * step.blocks[1]


def test_more_recomputed_blocks_need_less(load_tiny):
    step = measure_step(load_tiny().model.config, replace(SHAPE, length=128))
    totals = [predict(step, SHAPE, count, baseline=0).total for count in range(3)]
    assert totals[0] > totals[2]
    assert blocks_to_recompute(step, SHAPE, totals[0], baseline=0) == 0
    assert blocks_to_recompute(step, SHAPE, totals[0] - 1, baseline=0) == totals.index(min(totals))
    assert blocks_to_recompute(step, SHAPE, min(totals) - 1, baseline=0) is None


def test_a_teacher_and_a_longer_text_need_more(load_tiny):
    config = load_tiny().model.config
    step, long = measure_step(config, SHAPE), measure_step(config, replace(SHAPE, length=64))
    assert predict(step, replace(SHAPE, teacher=True), 0, baseline=0).total > predict(step, SHAPE, 0, baseline=0).total
    assert long.blocks[1] == 2 * step.blocks[1]


def test_auto_recomputes_only_under_a_tight_budget(load_tiny):
    """The same losses either way: recomputation changes memory, not results."""
    losses, counts = [], []
    for memory in (MemoryOptions(), MemoryOptions(budget=1), MemoryOptions("off"), MemoryOptions("on")):
        base = load_tiny()
        target = UniformTarget(TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))
        result = train(base, target, TrainOptions(steps=3, seq_len=16), evaluation=QUICK, memory=memory)
        losses.append([step.loss for step in result.history])
        counts.append(result.recomputed_blocks)
    assert counts == [0, 2, 0, 2]
    assert all(other == pytest.approx(losses[0], rel=1e-6) for other in losses[1:])


def test_a_packed_base_recomputes_down_to_what_its_file_promises(load_tiny):
    """1.1 times the file and 550 MiB, whatever is free; but a budget of the user's own counts first."""
    config, mib, plenty = load_tiny().model.config, 2**20, 2**40
    shape = replace(SHAPE, quantization="gguf", packed=10 * mib)
    step = measure_step(config, shape)
    small, large = 300 * mib, 562 * mib
    assert chosen_blocks(step, shape, MemoryOptions(), plenty, baseline=small) == 0
    assert chosen_blocks(step, shape, MemoryOptions(), plenty, baseline=large) == 2
    assert chosen_blocks(step, shape, MemoryOptions(budget=plenty), plenty, baseline=large) == 0
    assert chosen_blocks(step, replace(shape, packed=0), MemoryOptions(), plenty, baseline=large) == 0


def test_micro_batches_are_the_same_step(load_tiny):
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        base = load_tiny()
        target = UniformTarget(TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))
        options = TrainOptions(steps=4, seq_len=8, batch_size=batch, grad_accum=accumulation)
        runs.append(train(base, target, options, evaluation=QUICK))
    # One generator draws (1, 8) four times as it draws (4, 8) once, so both runs see the same tokens.
    assert [s.loss for s in runs[1].history] == pytest.approx([s.loss for s in runs[0].history], rel=1e-5)
    assert runs[1].history[3].loss != runs[1].history[0].loss


def test_a_plan_that_does_not_fit_says_what_would(tiny_folders):
    plan = make_plan(tiny_folders["gpt2"], replace(SHAPE, method="full"), MemoryOptions(budget=1), time=False)
    assert not plan.fits
    with pytest.raises(XFactorError, match="the smallest that this model can do is `method=lora` `checkpointing=on`"):
        require_fit(plan)
    enough = replace(plan, budget=plan.advice[0][1])
    with pytest.raises(XFactorError, match="these settings would fit"):
        require_fit(enough)
    require_fit(replace(plan, budget=plan.memory.total))


def test_samples_take_a_bounded_cache(load_tiny):
    model = load_tiny().model
    token = 2 * 2 * 64 * 4
    assert tokens_at_once(SplitModel(model)) == 128 * 2**20 // token
    room = iter((96 * 2**20, 80 * 2**20))  # asked for anew each time: what was left may be taken by now
    with cache_limit(lambda: next(room)):
        assert tokens_at_once(SplitModel(model)) == 96 * 2**20 // token
        assert tokens_at_once(SplitModel(model)) == 80 * 2**20 // token
    with cache_limit(lambda: 0):
        assert tokens_at_once(SplitModel(model)) == 32 * 2**20 // token
    with cache_limit(lambda: 0), cache_limit(lambda: 2**40):
        assert tokens_at_once(SplitModel(model)) == 128 * 2**20 // token
    with cache_limit(lambda: 2**40, 2**29):
        assert tokens_at_once(SplitModel(model)) == 2**29 // token


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predicted_memory_is_the_measured_one(tmp_path):
    """Within 10 %, of the literal command read from outside; benchmarks/plan_accuracy.py does so with forty."""
    script = [sys.executable, ROOT / "benchmarks/plan_accuracy.py", "--output", tmp_path]
    dtype = pick_dtype("auto", torch.device("cpu"))  # in software, bf16 takes a quarter of an hour
    names = [f"demo-{dtype}-whole-64", "demo-8bit-recomputed-64"]
    done = subprocess.run(
        [*script, "--only", names[0], "--only", names[1]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["error"] == pytest.approx(0, abs=0.10), found
        assert found["phases"].keys() == {"load", "R before", "training", "R after", "saving"}
