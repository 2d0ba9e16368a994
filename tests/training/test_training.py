"""The loop learns what it should, where it should, on every family; and says so when it does not."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import KINDS
from tests.training.uniform import QUICK, x_target
from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora, matched_modules
from xfactor_peft.objective import kl as losses
from xfactor_peft.objective import reference
from xfactor_peft.options import LoraOptions, TrainOptions
from xfactor_peft.sampling.metrics import evaluate
from xfactor_peft.training.train import train

SHORT = TrainOptions(steps=60, batch_size=4, seq_len=16, lr=1e-2)
EXPECTED = {
    "gpt2": {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 2, "mlp.c_proj": 2},
    "llama": {f"self_attn.{n}_proj": 2 for n in "qkvo"} | {f"mlp.{n}_proj": 2 for n in ("gate", "up", "down")},
    "gpt_neox": {f"attention.{n}": 2 for n in ("query_key_value", "dense")}
    | {f"mlp.{n}": 2 for n in ("dense_h_to_4h", "dense_4h_to_h")},
    "opt": {f"self_attn.{n}_proj": 2 for n in ("k", "v", "q", "out")} | {"fc1": 2, "fc2": 2},
}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_learns_and_touches_nothing_else(load_tiny, kind):
    base = load_tiny(kind)
    before = state(base.model)
    result = train(base, x_target(base), SHORT, LoraOptions(r=8), QUICK)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert result.after.rate > result.before.rate + 0.3
    assert result.after.interval[0] > result.before.interval[1]
    after = {name.replace(".base_layer", ""): p for name, p in base.model.named_parameters()}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    moved = [name for name, p in result.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == sum(result.modules.values())


@pytest.mark.parametrize("kind", KINDS)
def test_targets_match_the_family(load_tiny, kind):
    model = load_tiny(kind).model
    attention, mlp = matched_modules(model, "attention"), matched_modules(model, "mlp")
    assert matched_modules(model, "all") == EXPECTED[kind] == attention | mlp
    assert all("attn" in name or "attention" in name for name in attention)
    assert not attention.keys() & mlp.keys()


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_adapters_sit_only_on_the_chosen_layers(tiny, target):
    result = train(tiny, x_target(tiny), TrainOptions(steps=2, seq_len=8), LoraOptions(r=2, target=target), QUICK)
    names = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert names
    assert all(("attn" in name) == (target == "attention") for name in names)
    assert result.parameters == sum(p.numel() for p in result.model.parameters() if p.requires_grad)


def test_full_fine_tuning_moves_every_weight(load_tiny):
    base = load_tiny()
    before = state(base.model)
    result = train(base, x_target(base), TrainOptions(method="full", steps=40, seq_len=16, lr=1e-3), evaluation=QUICK)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    # A key's bias shifts all of a query's scores alike, so its gradient is 0 up to rounding; the rest must move.
    moved = {name: not torch.equal(value, before[name]) for name, value in base.model.named_parameters()}
    assert all(moved.values()), [name for name, value in moved.items() if not value]
    assert result.lora is None


def test_one_process_may_train_in_several_precisions(load_tiny):
    """Accelerate would refuse the second run: its state holds the first one's precision."""
    for dtype, method in (("fp32", "lora"), ("bf16", "full"), ("fp32", "full")):
        base = load_tiny(dtype=dtype, master_weights=method == "full")
        result = train(base, x_target(base), TrainOptions(method=method, steps=2, seq_len=8), evaluation=QUICK)
        assert len(result.history) == 2


def test_first_loss_is_the_kl_of_the_base_on_the_seeded_inputs(tiny):
    target, options = x_target(tiny), TrainOptions(steps=1, seq_len=16, seed=3)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(tiny.tokenizer), (4, 16), generator=generator)
    with torch.no_grad():
        log_q = tiny.model(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
    expected = F.kl_div(log_q, target.probabilities().expand_as(log_q), reduction="batchmean")
    result = train(tiny, target, options, evaluation=QUICK)
    assert result.history[0].loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_beta_target_is_reached_without_collapse(tiny):
    """With beta > 0 the target keeps mass off the set, and so does the trained model."""
    target = x_target(tiny, alpha=20.0, beta=1.0)
    result = train(tiny, target, TrainOptions(steps=80, seq_len=16, lr=5e-3), LoraOptions(), QUICK)
    assert 0.0 < target.set_mass < 0.5
    assert result.history[-1].set_mass < 2 * target.set_mass
    assert result.history[-1].loss < result.history[0].loss


def test_full_fine_tuning_is_scored_against_the_base_that_it_was(load_tiny):
    """Nothing of the base is left in the model, so its own scores would be KL 0 and its own perplexity."""
    base = load_tiny()
    result = train(base, x_target(base), TrainOptions(method="full", steps=40, seq_len=16, lr=1e-3), evaluation=QUICK)
    untrained = load_tiny()
    expected = evaluate(split(base.model), base.tokenizer, x_target(base).tokens, QUICK, base=split(untrained.model))
    assert result.after == expected
    assert result.after.kl_from_base > 1
    assert result.after.perplexity > 2 * result.before.perplexity


def test_same_seed_same_run(load_tiny):
    options = TrainOptions(steps=5, seq_len=8)
    runs = [train(base, x_target(base), options, evaluation=QUICK) for base in (load_tiny(), load_tiny())]
    assert [s.loss for s in runs[0].history] == [s.loss for s in runs[1].history]
    assert runs[0].after == runs[1].after
    other = load_tiny()
    different = train(other, x_target(other), TrainOptions(steps=5, seq_len=8, seed=1), evaluation=QUICK)
    assert different.history[0].loss != runs[0].history[0].loss


def test_dropout_of_the_base_is_off_but_lora_dropout_is_on(load_tiny):
    base = load_tiny()
    assert base.model.config.resid_pdrop > 0
    base.model.train()
    ids = torch.arange(20)[None]
    assert torch.equal(base.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
    losses = []
    for dropout in (0.0, 0.5):
        other = load_tiny()
        result = train(other, x_target(other), TrainOptions(steps=3, seq_len=8), LoraOptions(dropout=dropout), QUICK)
        losses.append(result.history[-1].loss)
    assert losses[0] != losses[1]


def test_bf16_follows_fp32(load_tiny):
    runs = []
    for dtype in ("fp32", "bf16"):
        base = load_tiny(dtype=dtype)
        runs.append(train(base, x_target(base), TrainOptions(steps=20, seq_len=16), evaluation=QUICK))
    for exact, low in zip(runs[0].history, runs[1].history, strict=True):
        assert low.loss == pytest.approx(exact.loss, rel=0.03)
    trainable = [p.dtype for p in runs[1].model.parameters() if p.requires_grad]
    assert set(trainable) == {torch.float32}


def test_no_positions_by_vocabulary_tensor_in_a_step(tiny):
    """No tensor of a forward and backward pass is as large as the logits would be; eagerly one is."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    split_model, target = split(add_lora(tiny.model, LoraOptions()).get_base_model()), x_target(tiny)
    ids = torch.randint(len(tiny.tokenizer), (8, 64))
    p, mask = target.probabilities(), target.tokens.mask()
    with Largest() as chunked:
        losses.kl_loss(split_model.hidden(ids), split_model.weight, p, mask, chunk=32).loss.backward()
    with Largest() as eager:
        reference.kl_loss(split_model.hidden(ids), split_model.weight, p, mask)[0].backward()
    assert chunked.elements < ids.numel() * tiny.vocab_size <= eager.elements


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seq_len": 0}, "`seq_len` must be at least 1"),
        ({"lr": 0.0}, "`lr` must be greater than 0"),
        ({"lr": math.nan}, "`lr` must be greater than 0"),
        ({"method": "magic"}, "`method` must be"),
        ({"optimizer": "sgd"}, "`optimizer` must be"),
        ({"weight_decay": -1.0}, "`weight_decay` must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(XFactorError, match=message):
        TrainOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`lora.r` must be at least 1"),
        ({"alpha": 0}, "`lora.alpha` must be greater than 0"),
        ({"dropout": 1.0}, "`lora.dropout` must be"),
        ({"target": "embedding"}, "`lora.target` must be"),
    ],
)
def test_bad_lora_options(options, message):
    with pytest.raises(XFactorError, match=message):
        LoraOptions(**options)


def test_sequence_longer_than_the_context(tiny):
    with pytest.raises(XFactorError, match="`seq_len=129` is longer than the model's context of 128"):
        train(tiny, x_target(tiny), TrainOptions(seq_len=129), evaluation=QUICK)


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(XFactorError, match=r"step \d+: loss .*lower `lr`"):
        train(tiny, x_target(tiny), TrainOptions(steps=30, seq_len=8, lr=1e30), evaluation=QUICK)


def test_a_model_that_changes_its_logits_is_refused(tiny):
    original = tiny.model.forward

    def capped(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    tiny.model.forward = capped
    with pytest.raises(XFactorError, match="soft-capping or scaling"):
        split(tiny.model)
