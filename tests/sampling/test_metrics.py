"""Scores against values worked out by hand or by brute force."""

import math

import pytest
import torch

from tests.tiny import KINDS
from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.options import EvalOptions, LoraOptions, SamplingOptions
from xfactor_peft.sampling import sampler
from xfactor_peft.sampling.generation import encode_prompt, generate
from xfactor_peft.sampling.metrics import distinct_n, evaluate, rate_per_sequence
from xfactor_peft.sampling.sampler import sample
from xfactor_peft.tokens.ends import special_ids
from xfactor_peft.tokens.token_set import TokenSet

PROMPTS = ("Once upon a time", "The fox", "A", "The cat")


def test_rate_and_distinct_by_hand():
    mask = torch.tensor([False, True, True, False])
    rows = torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]])
    assert rate_per_sequence(rows, mask).tolist() == [0.5, 0.0]
    assert distinct_n(rows.tolist(), 2) == pytest.approx(4 / 6)
    assert distinct_n([[1]], 2) == 0.0


def draw(base, prompts, options, repeats=1):
    ids = [base.tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(repeats)]
    return list(sample(split(base.model), ids, options, sorted(special_ids(base.tokenizer))))


def test_samples_have_one_length_and_no_special_token(tiny):
    batches = draw(tiny, PROMPTS, SamplingOptions(max_new_tokens=12), 3)
    rows = torch.cat([batch.continuations for batch in batches])
    assert rows.shape == (len(PROMPTS) * 3, 12)
    assert not set(rows.flatten().tolist()) & special_ids(tiny.tokenizer)
    for batch in batches:
        for row, start in zip(batch.ids.tolist(), batch.starts.tolist(), strict=True):
            assert tiny.tokenizer.decode(row[:start]) in PROMPTS


def test_a_text_does_not_depend_on_its_batch(tiny, monkeypatch):
    """Prompts of several lengths in one batch, in two, or each alone: the same texts, drawn from the same states."""
    options = SamplingOptions(max_new_tokens=9, seed=3)
    whole = draw(tiny, PROMPTS, options, 2)
    assert len(whole) == 1
    assert len(set(whole[0].starts.tolist())) > 1
    assert len({tuple(row) for row in whole[0].continuations.tolist()}) > len(PROMPTS)  # no two alike
    for most, fewest in (0, 2 * len(PROMPTS)), (3 * int(whole[0].starts.max() + 9), 2):
        monkeypatch.setattr(sampler, "tokens_at_once", lambda _, most=most: most)
        parts = draw(tiny, PROMPTS, options, 2)
        assert len(parts) >= fewest
        assert torch.equal(torch.cat([part.continuations for part in parts]), whole[0].continuations)
        torch.testing.assert_close(torch.cat([part.states for part in parts]), whole[0].states, atol=1e-4, rtol=1e-4)


def test_batches_hold_every_text_once_and_no_more_than_the_cache():
    lengths = [9, 3, 3, 20, 5, 3, 4]
    assert list(sampler.batches_of(lengths, 12)) == [[1, 2, 5], [6, 4], [0], [3]]
    assert list(sampler.batches_of(lengths, 0)) == [[1], [2], [5], [6], [4], [0], [3]]
    assert list(sampler.batches_of(lengths, 7 * 20)) == [[1, 2, 5, 6, 4, 0, 3]]
    assert list(sampler.batches_of([], 5)) == []
    assert [len(batch) for batch in sampler.batches_of([2] * 40, 50)] == [16, 24]
    assert [len(batch) for batch in sampler.batches_of([2] * 30 + [40], 50)] == [16, 14, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_masses_are_those_of_a_forward_pass(load_tiny, kind):
    base = load_tiny(kind)
    tokens = TokenSet.contains(base.tokenizer, "e", vocab_size=base.vocab_size)
    split_model, banned = split(base.model), sorted(special_ids(base.tokenizer))
    prompts = [base.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    (batch,) = sample(split_model, prompts, SamplingOptions(max_new_tokens=7), banned, tokens.mask()[None].float())
    with torch.no_grad():
        hidden = split_model.hidden(batch.ids)
        logits = base.model(input_ids=batch.ids).logits
    torch.testing.assert_close(batch.states, batch.predicting(hidden), atol=1e-4, rtol=1e-4)
    logits[..., banned] = -math.inf
    for row, start in enumerate(batch.starts.tolist()):
        p = logits[row, start - 1 : start + 6].softmax(-1)
        torch.testing.assert_close(batch.masses[row, :, 0], p[:, list(tokens.ids)].sum(-1), atol=1e-5, rtol=1e-4)


def test_what_the_checkpoint_asks_of_decoding_changes_nothing(tiny):
    """Samples that are measured come from the model's own distribution, whatever generation_config.json says."""
    options = SamplingOptions(max_new_tokens=12)
    expected = draw(tiny, PROMPTS, options)[0].continuations
    tiny.model.generation_config.update(
        repetition_penalty=5.0, min_p=0.9, no_repeat_ngram_size=1, temperature=0.1, top_k=1, num_beams=3,
        suppress_tokens=[5, 6, 7], forced_eos_token_id=3, bad_words_ids=[[9]], min_new_tokens=20,
    )  # fmt: skip
    assert torch.equal(draw(tiny, PROMPTS, options)[0].continuations, expected)


def test_sampling_is_unbiased(tiny):
    """First tokens of many samples follow the model's own softmax (special tokens aside)."""
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([tiny.tokenizer("A")["input_ids"]])).logits[0, -1]
    logits[sorted(special_ids(tiny.tokenizer))] = -math.inf
    expected = logits.softmax(-1)
    plain = _frequencies(tiny, SamplingOptions(max_new_tokens=1), 4000)
    assert 0.5 * (plain - expected).abs().sum() < 0.08
    assert plain[expected == 0].sum() == 0
    two = _frequencies(tiny, SamplingOptions(max_new_tokens=1, top_k=2), 400)
    assert 0.5 * (two - expected).abs().sum() > 0.15
    assert set(two.nonzero().flatten().tolist()) <= set(expected.topk(2).indices.tolist())
    cold = _frequencies(tiny, SamplingOptions(max_new_tokens=1, temperature=0.5), 4000)
    assert 0.5 * (cold - (logits / 0.5).softmax(-1)).abs().sum() < 0.08
    greedy = _frequencies(tiny, SamplingOptions(max_new_tokens=1, temperature=0.0), 3)
    assert greedy[expected.argmax()] == 1


def _frequencies(tiny, options, repeats):
    rows = torch.cat([batch.continuations for batch in draw(tiny, ["A"], options, repeats)])
    return torch.bincount(rows.flatten(), minlength=tiny.vocab_size) / len(rows)


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
    for batch in draw(tiny, PROMPTS, options.sampling, 2):
        with torch.no_grad():
            p = batch.predicting(model(input_ids=batch.ids).logits).double().softmax(-1)
            with model.disable_adapter():
                q = batch.predicting(model(input_ids=batch.ids).logits).double().softmax(-1)
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
