"""Training for a rate: the rate is met, the price is the frontier's, the rest of the text is left alone."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from tests.tiny import KINDS, tiny_model
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.lowmem.gguf_layers import PackedMatrix
from xfactor_peft.objective.targets import Goal, TiltedTarget, UniformTarget
from xfactor_peft.options import (
    EvalOptions,
    LoadOptions,
    LoraOptions,
    ObjectiveOptions,
    RateOptions,
    Recipe,
    SamplingOptions,
    TrainOptions,
)
from xfactor_peft.runs.run import default_name, train_to_folder
from xfactor_peft.sampling.contexts import batches, context_pool, file_contexts, openings, self_contexts
from xfactor_peft.sampling.frontier import measure_frontier
from xfactor_peft.sampling.metrics import evaluate
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.loop import plateau
from xfactor_peft.training.sequence.phase import reason_to_stop
from xfactor_peft.training.sequence.trainer import SequenceStep
from xfactor_peft.training.train import train

SCORES = EvalOptions(
    ("Once upon a time", "The fox", "A cat", "In the house"), 24, SamplingOptions(max_new_tokens=48, seed=5)
)
BRIEF = TrainOptions(steps=20, seq_len=24)
ON_AVERAGE = RateOptions("on-average")
PLAIN = ObjectiveOptions(dial=False, rate=ON_AVERAGE)


def x_set(base, text="X"):
    return TokenSet.contains(base.tokenizer, text, vocab_size=base.vocab_size)


def parts_add_up(scores):
    parts = [scores.kl_parts[name] for name in ("mass", "inside", "outside")]
    assert min(parts) > -1e-5
    assert sum(parts) == pytest.approx(scores.kl_from_base, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_met_on_every_family(load_tiny, kind):
    base = load_tiny(kind)
    result = train(base, TiltedTarget.of(x_set(base), 0.3), BRIEF, evaluation=SCORES, objective=PLAIN)
    assert abs(result.before.rate - 0.3) > 0.1
    assert result.after.rate == pytest.approx(0.3, abs=0.06)
    assert result.rate.frontier.ratio == pytest.approx(1.0, abs=0.02)
    assert result.after.kl_parts["outside_conditional"] < 1e-3
    assert "is the tilt" in result.rate.stopped
    parts_add_up(result.after)


def test_a_set_head_costs_what_measuring_the_logit_bias_gives(tiny):
    """A run takes the scores of a constant set head for those of the bias; here the bias is looked for and measured."""
    result = train(tiny, TiltedTarget.of(x_set(tiny), 0.3), BRIEF, evaluation=SCORES, objective=PLAIN)
    taken = result.rate.frontier
    measured = measure_frontier(
        SplitModel(tiny.model), tiny.tokenizer, x_set(tiny), result.after, SCORES, start=0.5,
        adapter_off=result.model.disable_adapter,
    )  # fmt: skip
    assert measured.strength == pytest.approx(taken.strength, abs=0.1)
    assert measured.kl == pytest.approx(taken.kl, rel=0.02)
    assert measured.ratio == pytest.approx(taken.ratio, abs=0.02)


def test_a_wanted_zero_silences_the_set(tiny):
    result = train(tiny, TiltedTarget.of(x_set(tiny), 0.0), BRIEF, evaluation=SCORES, objective=PLAIN)
    assert result.before.rate > 0.005
    assert result.after.rate == 0
    assert result.after.set_mass < 1e-6


def test_lambda_sets_the_bias_itself(tiny):
    result = train(
        tiny,
        TiltedTarget.of(x_set(tiny), strength=1.5),
        BRIEF,
        evaluation=SCORES,
        objective=ObjectiveOptions(dial=False),
    )
    assert result.rate.offsets == [1.5]
    assert result.rate.wanted is None
    assert not result.rate.calibration


def test_a_head_that_starts_at_nothing_learns_the_tilt(tiny, monkeypatch):
    """The closed form is not needed: from a = b = 0 the same objective finds it."""
    from xfactor_peft.training import phases

    class FromZero(phases.SetHead):
        def shift(self, amount):
            pass

    monkeypatch.setattr(phases, "SetHead", FromZero)
    options = TrainOptions(steps=200, seq_len=24, lr=5e-2)
    objective = ObjectiveOptions(dial=False, early_stop=False)
    result = train(tiny, TiltedTarget.of(x_set(tiny), strength=3.0), options, evaluation=SCORES, objective=objective)
    assert result.history[0].loss > 0.05
    assert result.history[-1].loss < 0.05 * result.history[0].loss
    assert result.after.rate > 3 * result.before.rate


def test_blocks_alone_learn_something_but_pay_more(tiny):
    lora = LoraOptions(r=8, target="all")
    options = TrainOptions(steps=150, seq_len=24, lr=5e-3)
    result = train(tiny, TiltedTarget.of(x_set(tiny), 0.3), options, lora, SCORES, PLAIN)
    assert result.rate.offsets is None
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert result.after.rate > result.before.rate + 0.1
    assert result.after.rate == pytest.approx(0.3, abs=0.08)
    assert result.rate.frontier.ratio > 1.02
    assert result.after.kl_parts["outside_conditional"] > 1e-3


def test_blocks_alone_learn_about_a_rare_set(tiny):
    """The base is nearly the teacher already, but not yet silent."""
    with torch.no_grad():
        p = tiny.model(input_ids=self_contexts(tiny, 32, 16)).logits.softmax(-1).mean((0, 1))
    tokens = TokenSet.token_ids(tiny.tokenizer, [int(p.argmin())], vocab_size=tiny.vocab_size)
    assert p.min() < 1e-4
    target = TiltedTarget.of(tokens, 0.0)
    lora, options = LoraOptions(r=4, target="attention"), TrainOptions(steps=12, seq_len=16)
    result = train(tiny, target, options, lora, None, PLAIN)
    assert result.history[0].loss < 2e-4
    assert len(result.history) > 1
    assert any(p.any() for name, p in result.model.named_parameters() if "lora_B" in name)


def test_several_goals_are_met_together(tiny):
    wanted = {"X": 0.2, "x": 0.1, "e": 0.0}
    target = TiltedTarget(tuple(Goal(x_set(tiny, text), rate) for text, rate in wanted.items()))
    result = train(tiny, target, BRIEF, evaluation=SCORES, objective=PLAIN)
    for goal, rate in zip(result.after.goals, wanted.values(), strict=True):
        assert goal["rate"] == pytest.approx(rate, abs=0.05)
    assert result.after.goals[2]["rate"] == 0
    assert result.before.goals[2]["rate"] > 0.02


def test_saved_loaded_and_dialled(tiny, load_tiny, tmp_path):
    target = TiltedTarget.of(x_set(tiny), 0.3)
    _, record = train_to_folder(
        tiny, target, tmp_path / "x", Recipe(BRIEF, None, SCORES, ObjectiveOptions(rate=ON_AVERAGE))
    )
    dial = json.loads((tmp_path / "x/xfactor.json").read_text())["rate"]["dial"]
    rates = [rate for _, rate in dial]
    assert rates == sorted(rates)
    assert dict(dial)[1.0] == pytest.approx(0.3, abs=0.03)
    bank = AdapterBank(load_tiny(), tmp_path)
    bank.load("x")
    scale = bank.scale_for_rate("x", 0.15)
    assert 0 < scale < 1
    bank.use("x", scale)
    scores = evaluate(
        split(bank.base.model), bank.base.tokenizer, bank.token_set("x"), SCORES, adapter_off=bank.base_only
    )
    assert scores.rate == pytest.approx(0.15, abs=0.05)
    bank.use("x")
    plain = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "x").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, bank.model(input_ids=ids).logits)
    assert record["rate"]["frontier"]["ratio"] == pytest.approx(1.0, abs=0.02)
    with pytest.raises(XFactorError, match="outside what adapter x was measured for"):
        bank.scale_for_rate("x", 0.999)


def taught_to_fork(base):
    """Teach the tiny model a language in which planning pays, and return the set of its token X.

    Every other token is "a" (one in ten) or "b"; after "a" comes X half of the time, after "b" one time in a hundred. A
    constant bias can only force X after "b"; a planner says "a" more often.
    """
    ids = {text: base.tokenizer.convert_tokens_to_ids(text) for text in "abcdX"}
    start = torch.full((8, 1), base.tokenizer.bos_token_id)
    generator = torch.Generator().manual_seed(0)
    base.model.requires_grad_(True)
    optimizer = torch.optim.Adam(base.model.parameters(), lr=5e-3)
    for _ in range(150):
        first = torch.rand(8, 37, generator=generator) < 0.1
        second = torch.rand(8, 37, generator=generator) < torch.where(first, 0.5, 0.01)
        after = torch.where(second, ids["X"], torch.where(first, ids["c"], ids["d"]))
        pairs = torch.stack([torch.where(first, ids["a"], ids["b"]), after], dim=2).flatten(1)
        rows = torch.cat([start, pairs], dim=1)
        loss = base.model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    base.model.requires_grad_(False)
    return TokenSet.token_ids(base.tokenizer, [ids["X"]], vocab_size=base.vocab_size)


def test_swaps_with_an_adapter_of_another_shape(tiny, load_tiny, tmp_path):
    """A set head and a plain LoRA in one bank: each keeps its logits, in any order, and none leaks into the base."""
    train_to_folder(tiny, TiltedTarget.of(x_set(tiny), 0.3), tmp_path / "rate", Recipe(BRIEF, None, SCORES, PLAIN))
    other = load_tiny()
    train_to_folder(other, UniformTarget(x_set(other)), tmp_path / "uniform", Recipe(BRIEF, None, SCORES))
    bank, ids = AdapterBank(load_tiny(), tmp_path), torch.arange(12)[None]

    def logits(name):
        bank.use(name)
        with torch.no_grad():
            return bank.model(input_ids=ids).logits

    base = logits(None)
    for name in ("uniform", "rate"):
        bank.load(name)
    first, second = logits("rate"), logits("uniform")
    assert torch.equal(logits("rate"), first)
    assert torch.equal(logits("uniform"), second)
    assert torch.equal(logits(None), base)
    members = x_set(tiny).mask()
    assert torch.equal(first[..., ~members], base[..., ~members])
    torch.testing.assert_close((first - base)[..., members].std(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert not torch.allclose(second, base)


def planned(base, **more):
    """A rate of 0.2 on a model whose texts fork, with whole texts planned."""
    tokens = taught_to_fork(base)
    scores = EvalOptions(("b", "a"), 32, SamplingOptions(max_new_tokens=64, seed=5))
    objective = ObjectiveOptions(sequence_level=True, sequence_steps=25, dial=False, **more)
    options = TrainOptions(steps=20, seq_len=24, lr=3e-3)
    return train(base, TiltedTarget.of(tokens, 0.2), options, None, scores, objective)


def test_what_planning_does_outside_of_the_set_has_a_price(load_tiny):
    """The fork is taken by other tokens than the set's: a price on these makes it dear."""
    runs = (planned(load_tiny(), outside_price=price, frontier=False) for price in (0.0, 20.0))
    free, priced = (run.after for run in runs)
    assert free.kl_parts["outside"] > 0.02
    assert priced.kl_parts["outside"] < 0.3 * free.kl_parts["outside"]
    assert priced.rate == pytest.approx(0.2, abs=0.04)


def test_planning_goes_below_the_logit_bias_where_planning_pays(tiny):
    result = planned(tiny, outside_price=0.0)
    assert result.lora.target == "all,head"
    assert len(result.rate.sequence.steps) == 25
    assert result.after.rate == pytest.approx(0.2, abs=0.04)
    assert result.rate.frontier.ratio < 0.9
    assert result.rate.sequence.kept
    parts_add_up(result.after)


def test_where_planning_gains_nothing_the_tilt_comes_back(tiny, monkeypatch):
    """Two batches at a rate that harms: a policy that is worse than the tilt is not kept."""
    from xfactor_peft.sampling import own_samples
    from xfactor_peft.training.sequence import phase as sequence_phase

    monkeypatch.setattr(own_samples, "TEXTS", 64)
    monkeypatch.setattr(sequence_phase, "CHECK_TEXTS", 64)
    objective = ObjectiveOptions(sequence_level=True, sequence_steps=4, dial=False)
    options = TrainOptions(steps=2, seq_len=24, lr=0.3)
    result = train(tiny, TiltedTarget.of(x_set(tiny), 0.2), options, None, SCORES, objective)
    planning = result.rate.sequence
    assert planning.kl > 1.5 * planning.kl_of_tilt
    assert not planning.kept
    assert "planning gained nothing" in result.rate.stopped
    assert result.rate.offsets == pytest.approx(result.rate.strengths)
    assert result.rate.frontier.ratio == pytest.approx(1.0, abs=0.02)
    assert result.after.rate == pytest.approx(0.2, abs=0.06)


def test_a_packed_output_embedding_plans_as_an_unpacked_one(tiny, tmp_path, monkeypatch):
    """The same model with its weights in float16 in a GGUF file: the same steps, but for what that rounds."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from xfactor_peft.sampling import own_samples
    from xfactor_peft.training.sequence import phase as sequence_phase

    monkeypatch.setattr(own_samples, "TEXTS", 64)
    monkeypatch.setattr(sequence_phase, "CHECK_TEXTS", 64)
    export(AdapterBank(tiny, tmp_path), Mix(), "gguf", tmp_path / "tiny.gguf")
    packed = load_base(resolve_model(str(tmp_path / "tiny.gguf")), LoadOptions("fp32"))
    assert isinstance(split(packed.model).weight, PackedMatrix)
    objective = ObjectiveOptions(sequence_level=True, sequence_steps=3, dial=False, frontier=False)
    options = TrainOptions(steps=2, seq_len=24)
    one, other = (
        train(base, TiltedTarget.of(x_set(base), 0.2), options, None, None, objective).rate.sequence.steps
        for base in (tiny, packed)
    )
    assert len(one) == len(other) == 3
    for field in ("rate", "kl", "strength"):
        values = [[getattr(step, field) for step in steps] for steps in (one, other)]
        assert values[1] == pytest.approx(values[0], rel=0.1)


def test_frontier_of_a_tilt_is_the_tilt(tiny):
    tokens = x_set(tiny)
    split_model = split(tiny.model)
    tilted = SplitModel(tiny.model, 2.0 * tokens.mask().float())
    scores = evaluate(tilted, tiny.tokenizer, tokens, SCORES, base=split_model)
    frontier = measure_frontier(split_model, tiny.tokenizer, tokens, scores, SCORES, start=0.5)
    assert frontier.strength == pytest.approx(2.0, abs=0.1)
    assert frontier.ratio == pytest.approx(1.0, abs=0.05)
    plain = evaluate(split_model, tiny.tokenizer, tokens, SCORES)
    assert scores.rate > plain.rate
    assert plain.kl_from_base == 0


def test_kl_to_base_holds_a_uniform_run_back(load_tiny):
    found = []
    for weight in (0.0, 5.0):
        base = load_tiny()
        options = TrainOptions(steps=60, seq_len=16, lr=1e-2)
        objective = ObjectiveOptions(kl_to_base=weight)
        found.append(train(base, UniformTarget(x_set(base)), options, None, SCORES, objective))
    free, held = found
    assert held.after.kl_from_base < 0.5 * free.after.kl_from_base
    assert held.after.rate > held.before.rate
    assert any("distinct-2" in warning or "perplexity" in warning for warning in free.warnings)


def test_contexts(tiny, tmp_path):
    drawn = self_contexts(tiny, 6, 20, seed=1)
    assert drawn.shape == (6, 20)
    assert not (drawn == tiny.tokenizer.eos_token_id).any()
    assert torch.equal(drawn, self_contexts(tiny, 6, 20, seed=1))
    assert not torch.equal(drawn, self_contexts(tiny, 6, 20, seed=2))
    assert openings(tiny, 3).shape == (3, 8)
    text = tmp_path / "text.txt"
    text.write_text("The fox sat on the box. " * 20)
    windows = context_pool(tiny, str(text), 16, seed=0)
    assert tiny.tokenizer.decode(windows[0]).startswith("The fox sat")
    text.write_text("short")
    with pytest.raises(XFactorError, match="fewer than `seq_len="):
        context_pool(tiny, str(text), 16, seed=0)


def test_lambda_is_solved_in_a_few_windows_of_a_long_file(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(2000))))
    every = file_contexts(tiny, text, 4)
    assert len(every) > 1000
    windows = [context_pool(tiny, str(text), 4, seed=seed, count=128) for seed in (0, 0, 1)]
    assert [window.shape for window in windows] == 3 * [(128, 4)]
    assert torch.equal(windows[0], windows[1])
    assert not torch.equal(windows[0], windows[2])
    assert {tuple(row) for row in windows[0].tolist()} <= {tuple(row) for row in every.tolist()}
    trained = next(batches(tiny, str(text), 4000, 4, seed=0))
    assert len(torch.unique(trained, dim=0)) > 512  # on all of the file


def test_text_contexts_train(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The fox sat on the box. " * 50)
    objective = replace(PLAIN, contexts=str(text))
    result = train(tiny, TiltedTarget.of(x_set(tiny), 0.2), BRIEF, evaluation=SCORES, objective=objective)
    assert result.after.rate == pytest.approx(0.2, abs=0.06)


def test_planning_stops_when_nothing_is_won_or_texts_drift_apart():
    def steps(kl, spread, count=90):
        return [SequenceStep(i, 0.1, kl(i), 3.0, 0.1, 0.5, spread(i), 1.0) for i in range(count)]

    assert reason_to_stop(steps(lambda i: 1 - 0.005 * i, lambda i: 0.05), 0.1) is None
    assert "no longer falls" in reason_to_stop(steps(lambda i: 0.25, lambda i: 0.05), 0.1)
    assert "drift apart" in reason_to_stop(steps(lambda i: 1 - 0.005 * i, lambda i: 0.01 * i), 0.1)


def test_plateau():
    falling = [1 / (1 + i) for i in range(400)]
    assert not plateau(falling)
    assert plateau([1.0] * 200)
    assert not plateau([1.0] * 199)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_to_base": -1.0}, "`kl_to_base` must be at least 0"),
        ({"sequence_steps": 0}, "`sequence_steps` must be at least 1"),
        ({"contexts": "no-such-file"}, "`contexts` must be random, self or a text file"),
    ],
)
def test_bad_objective_options(options, message):
    with pytest.raises(XFactorError, match=message):
        ObjectiveOptions(**options)


def test_options_that_do_not_go_together(tiny):
    tilted, uniform = TiltedTarget.of(x_set(tiny), 0.1), UniformTarget(x_set(tiny))
    for target, options, lora, objective, message in (
        (tilted, {}, LoraOptions(variant="pissa"), {}, "`lora.variant=pissa` takes a part out of the base"),
        (tilted, {}, None, {"kl_to_base": 1.0}, "`kl_to_base` belongs to the uniform target"),
        (uniform, {}, None, {"sequence_level": True}, "`sequence_level=True` needs `goal.rate`"),
        (tilted, {"method": "full"}, None, {}, "`method=lora`"),
        (uniform, {"method": "full"}, None, {"kl_to_base": 1.0}, "`method=lora`"),
        (uniform, {}, LoraOptions(target="head"), {}, "needs `goal.rate`"),
    ):
        with pytest.raises(XFactorError, match=message):
            train(tiny, target, TrainOptions(**options), lora, SCORES, ObjectiveOptions(**objective))


def test_names_of_folders(tiny):
    tokens, options = x_set(tiny), TrainOptions()
    lora = LoraOptions(target="all,head")
    assert default_name(TiltedTarget.of(tokens, 0.1), options, lora) == "X-rate-0.1-all-head"
    assert default_name(TiltedTarget.of(tokens, strength=2), options, lora) == "X-lambda-2-all-head"
