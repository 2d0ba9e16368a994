"""Scores against values worked out by hand or by brute force."""

import math

import pytest
import torch

from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import EvalOptions, LoraOptions, SamplingOptions
from xfactor_peft.sampling.generation import encode_prompt, generate, sample_sequences
from xfactor_peft.sampling.metrics import bootstrap_interval, distinct_n, evaluate, rate_per_sequence
from xfactor_peft.tokens.token_bytes import special_ids
from xfactor_peft.tokens.token_set import TokenSet

PROMPTS = ("Once upon a time", "The fox", "A", "The cat")


def test_rate_and_distinct_by_hand():
    mask = torch.tensor([False, True, True, False])
    rows = torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]])
    assert rate_per_sequence(rows, mask).tolist() == [0.5, 0.0]
    assert distinct_n(rows.tolist(), 2) == pytest.approx(4 / 6)
    assert distinct_n([[1]], 2) == 0.0


def test_bootstrap_covers_the_mean_and_shrinks():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        values = torch.rand(50, generator=generator, dtype=torch.float64)
        low, high = bootstrap_interval(values, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99
    small, large = torch.rand(20, generator=generator), torch.rand(2000, generator=generator)
    widths = [high - low for low, high in map(bootstrap_interval, (small, large))]
    assert widths[1] < widths[0] / 4
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_samples_have_one_length_and_no_special_token(tiny):
    batches = list(sample_sequences(tiny.model, tiny.tokenizer, PROMPTS, SamplingOptions(max_new_tokens=12), repeats=3))
    rows = torch.cat([batch.continuations for batch in batches])
    assert rows.shape == (len(PROMPTS) * 3, 12)
    assert not set(rows.flatten().tolist()) & special_ids(tiny.tokenizer)
    for batch in batches:
        for row in batch.ids[:, : batch.prompt_length].tolist():
            assert tiny.tokenizer.decode(row) in PROMPTS


def test_sampling_is_unbiased(tiny):
    """First tokens of many samples follow the model's own softmax (special tokens aside)."""
    options = SamplingOptions(max_new_tokens=1)
    rows = torch.cat(
        [b.continuations for b in sample_sequences(tiny.model, tiny.tokenizer, ["A"], options, repeats=4000)]
    )
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([tiny.tokenizer("A")["input_ids"]])).logits[0, -1]
    logits[sorted(special_ids(tiny.tokenizer))] = -math.inf
    expected = logits.softmax(-1)
    counts = torch.bincount(rows.flatten(), minlength=len(expected)) / len(rows)
    assert 0.5 * (counts - expected).abs().sum() < 0.08
    skewed = SamplingOptions(max_new_tokens=1, top_k=2)
    assert 0.5 * (_frequencies(tiny, skewed, len(expected)) - expected).abs().sum() > 0.15


def _frequencies(tiny, options, size):
    rows = torch.cat(
        [b.continuations for b in sample_sequences(tiny.model, tiny.tokenizer, ["A"], options, repeats=400)]
    )
    return torch.bincount(rows.flatten(), minlength=size) / len(rows)


def test_sampling_leaves_the_random_state_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(tiny.model, tiny.tokenizer, "A", SamplingOptions(max_new_tokens=3))
    assert torch.equal(torch.rand(3), expected)


def test_scores_equal_brute_force(tiny):
    tokens = TokenSet.contains(tiny.tokenizer, "e")
    split_model = split(tiny.model)
    model = add_lora(tiny.model, LoraOptions(r=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    options = EvalOptions(PROMPTS, 2, SamplingOptions(max_new_tokens=9))
    scores = evaluate(split_model, tiny.tokenizer, tokens, options, adapter_off=model.disable_adapter)
    kl = mass = nll = rate = count = 0
    for batch in sample_sequences(tiny.model, tiny.tokenizer, PROMPTS, options.sampling, repeats=2):
        with torch.no_grad():
            p = model(input_ids=batch.ids).logits[:, batch.prompt_length - 1 : -1].double().softmax(-1)
            with model.disable_adapter():
                q = model(input_ids=batch.ids).logits[:, batch.prompt_length - 1 : -1].double().softmax(-1)
        kl += (p * (p / q).log()).sum().item()
        mass += p[..., list(tokens.ids)].sum().item()
        nll -= q.gather(-1, batch.continuations[..., None]).log().sum().item()
        rate += sum(i in tokens.ids for i in batch.continuations.flatten().tolist())
        count += batch.continuations.numel()
    assert scores.tokens == count
    assert scores.kl_from_base == pytest.approx(kl / count, rel=1e-4)
    assert scores.kl_from_base > 0.1
    assert scores.set_mass == pytest.approx(mass / count, rel=1e-4)
    assert scores.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert scores.rate == pytest.approx(rate / count)
    assert scores.interval[0] <= scores.rate <= scores.interval[1]


def test_the_base_is_no_distance_from_itself(tiny):
    scores = evaluate(
        split(tiny.model), tiny.tokenizer, TokenSet.contains(tiny.tokenizer, "X"), EvalOptions(PROMPTS, 1)
    )
    assert scores.kl_from_base == 0.0


def test_greedy_is_the_argmax(tiny):
    ids = generate(tiny.model, tiny.tokenizer, "The fox", SamplingOptions(max_new_tokens=1, temperature=0))
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([tiny.tokenizer("The fox")["input_ids"]])).logits[0, -1]
    assert ids == [int(logits.argmax())]


def test_an_empty_prompt_starts_from_bos(tiny):
    assert encode_prompt(tiny.tokenizer, tiny.model, "", 5) == [tiny.tokenizer.bos_token_id]


def test_a_prompt_beyond_the_context_is_an_error(tiny):
    with pytest.raises(XFactorError, match=r"exceed the model's context of 128"):
        encode_prompt(tiny.tokenizer, tiny.model, "the fox " * 100, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": math.nan}, "`temperature`"),
        ({"top_k": -1}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_p": 1.1}, "`top_p`"),
    ],
)
def test_bad_sampling_options(options, message):
    with pytest.raises(XFactorError, match=message):
        SamplingOptions(**options)
