"""The same rate everywhere: a head that looks holds it where a constant does not, also under another decoding."""

import pytest
import torch
from peft.helpers import rescale_adapter_scale

from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import Goal, TiltedTarget
from xfactor_peft.options import ObjectiveOptions, RateOptions, SamplingOptions, TrainOptions
from xfactor_peft.sampling import own_samples
from xfactor_peft.sampling.family_samples import FamilySamples
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training import rate_report
from xfactor_peft.training.train import train

RATE = 0.2


def two_languages(base):
    """Teach the tiny model to go on with what it began with: "a" and X now and then, or "b" and X hardly ever."""
    ids = {text: base.tokenizer.convert_tokens_to_ids(text) for text in "abX"}
    generator, model = torch.Generator().manual_seed(0), base.model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    kinds = torch.arange(8)[:, None] % 2 == 0
    for _ in range(120):
        hit = torch.rand(8, 32, generator=generator) < torch.where(kinds, 0.3, 0.02)
        rows = torch.where(hit, ids["X"], torch.where(kinds, ids["a"], ids["b"]))
        rows[:, :4] = torch.where(kinds, ids["a"], ids["b"])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    return TokenSet.token_ids(base.tokenizer, [ids["X"]], vocab_size=base.vocab_size)


@pytest.fixture(scope="module")
def taught(load_tiny):
    """(a function that loads the model, its set)."""
    base = load_tiny("llama")
    tokens = two_languages(base)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}

    def load():
        fresh = load_tiny("llama")
        fresh.model.load_state_dict(weights)
        return fresh

    return load, tokens


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("aaaa\naaaaaa\n\nbbbb\nbbbbbb\n")
    return str(file)


def rates_of(base, tokens, **decoding):
    """R after each kind of prompt, on fresh texts."""
    rows = {kind: [base.tokenizer.convert_tokens_to_ids([kind] * 5)] for kind in "ab"}
    options = SamplingOptions(32, **decoding)
    samples = FamilySamples(base, split(base.model), tokens.mask()[None].float(), rows, options)
    return samples.rates(150, 99).mean(1)[:, 0].tolist()


def fitted(taught, prompts, same, **decoding):
    load, tokens = taught
    base, objective = load(), ObjectiveOptions(dial=False, rate=RateOptions(same, prompts, **decoding))
    result = train(base, TiltedTarget.of(tokens, RATE), TrainOptions(seq_len=24), evaluation=None, objective=objective)
    return base, result


def test_the_head_holds_the_rate_where_a_constant_does_not(taught, prompts):
    base, result = fitted(taught, prompts, None)
    assert rates_of(base, taught[1]) == pytest.approx([RATE, RATE], abs=0.03)
    head = result.rate.head
    assert head.families == ["1", "2"]
    assert [row[0] for row in head.rates] == pytest.approx([RATE, RATE], abs=0.04)
    assert all(low < row[0] < high for row, ((low, high),) in zip(head.rates, head.intervals, strict=True))
    assert not head.offset  # behind an RMSNorm the weights alone say it
    assert result.rate.offsets == [0.0]
    assert head.strengths[0][0] < 0 < head.strengths[1][0]
    assert head.kl < 1.08 * head.kl_of_teacher
    plain, averaged = fitted(taught, prompts, "on-average")
    low, high = sorted(rates_of(plain, taught[1]))
    assert (low + high) / 2 == pytest.approx(RATE, abs=0.04)
    assert high > 2 * low
    assert averaged.rate.head is None


def test_a_rate_is_that_of_the_decoding_it_was_asked_for(taught, prompts):
    decoding = {"temperature": 0.6, "top_p": 0.95}
    base, _ = fitted(taught, prompts, None, **decoding)
    assert rates_of(base, taught[1], **decoding) == pytest.approx([RATE, RATE], abs=0.05)
    assert abs(rates_of(base, taught[1])[0] - RATE) + abs(rates_of(base, taught[1])[1] - RATE) > 0.1


@pytest.mark.parametrize(
    ("same", "cut"), [(None, {"top_k": 3}), ("on-average", {"top_k": 3}), ("on-average", {"top_p": 0.5})]
)
def test_a_rate_and_its_dial_count_what_the_decoding_leaves(tiny, tmp_path, monkeypatch, same, cut):
    """Most positions have no token of the set among the likeliest, until the adapter raises it."""
    tokens = TokenSet.contains(tiny.tokenizer, "X", vocab_size=tiny.vocab_size)
    monkeypatch.setattr(own_samples, "LONG", 64)
    monkeypatch.setattr(own_samples, "LENGTH", 32)
    monkeypatch.setattr(rate_report, "DIAL_SCALES", (0.25, 0.5))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The fox")
    objective = ObjectiveOptions(rate=RateOptions(same, str(prompts), **cut))
    result = train(tiny, TiltedTarget.of(tokens, RATE), TrainOptions(seq_len=24), evaluation=None, objective=objective)
    rows = {"fox": [tiny.tokenizer("The fox")["input_ids"]]}
    samples = FamilySamples(tiny, split(tiny.model), tokens.mask()[None].float(), rows, SamplingOptions(32, **cut))
    assert float(samples.rates(200, 99).mean()) == pytest.approx(RATE, abs=0.03)
    for scale, found in result.rate.dial:
        with rescale_adapter_scale(result.model, scale):
            assert found == pytest.approx(float(samples.rates(200, 99).mean()), abs=0.02)


def test_two_sets_each_hold_their_rate(tiny):
    first, second = (TokenSet.contains(tiny.tokenizer, text, vocab_size=tiny.vocab_size) for text in ("X", "e"))
    target = TiltedTarget((Goal(first, 0.2), Goal(second, 0.0)))
    result = train(tiny, target, TrainOptions(seq_len=24), evaluation=None, objective=ObjectiveOptions())
    for rates in result.rate.head.rates:
        assert rates[0] == pytest.approx(0.2, abs=0.06)
        assert rates[1] < 1e-4
    scales = [scale for scale, _ in result.rate.dial]
    assert scales == sorted(scales)
    assert [rate for _, rate in result.rate.dial] == sorted(rate for _, rate in result.rate.dial)


@pytest.mark.parametrize(
    ("options", "target", "more", "message"),
    [
        ({"temperature": 0.0}, None, {}, "`temperature` must be greater than 0 for a rate"),
        ({"prompts": "nowhere"}, None, {}, "`prompts` must be a file"),
        ({"same_rate": "here"}, None, {}, "`same_rate` must be one of everywhere, on-average"),
        (
            {"same_rate": "everywhere"},
            0.2,
            {"sequence_level": True},
            "`same_rate=everywhere` is for the set head alone",
        ),
        ({"same_rate": "everywhere"}, 0.2, {"early_stop": False}, "`same_rate=everywhere` is for the set head alone"),
        ({"temperature": 0.5}, "strength", {}, "`goal.strength` is taken as it is"),
    ],
)
def test_what_is_refused(tiny, options, target, more, message):
    tokens = TokenSet.contains(tiny.tokenizer, "X", vocab_size=tiny.vocab_size)
    goal = {"strength": 1.0} if target == "strength" else {"rate": target}

    def begin():
        objective = ObjectiveOptions(rate=RateOptions(**options), **more)
        train(tiny, TiltedTarget.of(tokens, **goal), evaluation=None, objective=objective)

    with pytest.raises(XFactorError, match=message):
        begin()
