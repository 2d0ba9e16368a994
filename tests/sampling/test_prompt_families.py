"""Families of prompts: the bundled ones, a user's file, and what is drawn after them."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.sampling.test_chat import TEMPLATE
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import SamplingOptions
from xfactor_peft.sampling import family_samples, prompt_families
from xfactor_peft.sampling.family_samples import FamilySamples
from xfactor_peft.sampling.prompt_families import PromptFamily, encode, fitting_prompts, read_families
from xfactor_peft.tokens.token_set import TokenSet


def test_the_bundled_prompts_are_apart():
    groups = json.loads(Path(prompt_families.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    assert set(groups) == {"fit", "held-out"}
    assert len(groups["held-out"]) == 8
    every = [prompt for part in groups.values() for prompts in part.values() for prompt in prompts]
    assert len(every) == len(set(every))
    assert min(len(prompts) for part in groups.values() for prompts in part.values()) >= 12
    assert {"letters", "verse and drama"} == set(groups["held-out"]) - set(groups["fit"])


def test_a_file_of_lines(tmp_path, tiny):
    file = tmp_path / "own.txt"
    file.write_text("\n\nThe fox\nA cat\n\n\n  \nOnce upon\n", encoding="utf-8")
    assert read_families(file) == [PromptFamily("1", ("The fox", "A cat")), PromptFamily("2", ("Once upon",))]
    rows = fitting_prompts(tiny, torch.zeros(1, 1, dtype=torch.long), str(file), 16)
    assert list(rows) == ["1", "2"]
    assert rows["1"][0] == tiny.tokenizer("The fox")["input_ids"]


def test_a_file_of_json_lines(tmp_path, tiny):
    file = tmp_path / "own.jsonl"
    lines = [
        {"prompt": "Hi\nthere", "family": "mail"},
        {"prompt": "Why?", "family": "asked", "chat": True},
        {"prompt": "A"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    found = read_families(file)
    assert found == [
        PromptFamily("mail", ("Hi\nthere",)),
        PromptFamily("asked", ("Why?",), chat=True),
        PromptFamily("prompts", ("A",)),
    ]
    tiny.tokenizer.chat_template = TEMPLATE
    rows = encode(tiny, found, 16)
    assert rows["asked"][0] != tiny.tokenizer("Why?")["input_ids"]
    assert "Why?" in tiny.tokenizer.decode(rows["asked"][0])
    assert rows["mail"][0] == tiny.tokenizer("Hi\nthere")["input_ids"]


def test_more_families_than_a_rate_takes(tmp_path, tiny):
    file = tmp_path / "own.txt"
    file.write_text("The fox\n\n" * 65)
    with pytest.raises(XFactorError, match="holds 65 kinds of prompts, a rate takes at most 64; join some"):
        fitting_prompts(tiny, torch.zeros(1, 1, dtype=torch.long), str(file), 16)
    file.write_text("The fox\n\n" * 64)
    assert len(fitting_prompts(tiny, torch.zeros(1, 1, dtype=torch.long), str(file), 16)) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": 1}', "line 2: expected"),
        ('{"prompt": "a", "famly": "b"}', "line 1: expected"),
        ('{"prompt": ""}', "line 1: expected"),
        ('{"prompt": "a"', "line 1: expected"),
        ('{"prompt": "a"}\n["b"]', "line 2: expected"),
        ('{"prompt": "a"}\n{"prompt": "b", "chat": true}', "family 'prompts' mixes chat and plain"),
    ],
)
def test_files_of_another_form(tmp_path, text, message):
    file = tmp_path / "own"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(XFactorError, match=message):
        read_families(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(XFactorError, match="cannot be read as UTF-8"):
        read_families(file)


def test_a_prompt_longer_than_the_context_is_cut_at_its_beginning(tiny):
    context = tiny.model.config.max_position_embeddings
    whole = tiny.tokenizer("fox " * 2 * context)["input_ids"]
    (row,) = encode(tiny, [PromptFamily("long", ("fox " * 2 * context,))], 16)["long"]
    assert row == whole[-(context - 16) :]


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.6}, {"temperature": 0.8, "top_p": 0.7}, {"top_k": 5}])
def test_masses_are_those_of_the_decoding(tiny, decoding):
    """Of every position's tokens, as many are of the set as its mass says."""
    tokens = TokenSet.regex(tiny.tokenizer, "[aeiou]", vocab_size=tiny.vocab_size)
    members, prompts = tokens.mask()[None].float(), {"a": [[3, 4]], "b": [[5], [6, 7, 8]]}
    samples = FamilySamples(tiny, split(tiny.model), members, prompts, SamplingOptions(4, **decoding))
    hits, masses = torch.zeros(2), torch.zeros(2)
    for batch in samples._drawn(600, 3):
        family = batch.rows // 600
        masses.index_add_(0, family, batch.masses[..., 0].mean(1) / 600)
        hits.index_add_(0, family, tokens.mask()[batch.continuations].float().mean(1) / 600)
    torch.testing.assert_close(hits, masses, atol=0.025, rtol=0)
    assert masses.min() > 0.1
    assert samples.rates(4, 0).shape == (2, 4, 1)


def test_every_piece_keeps_a_state_however_many_families_there_are(tiny, monkeypatch):
    monkeypatch.setattr(family_samples, "STATES", 10)
    members = TokenSet.contains(tiny.tokenizer, "e", vocab_size=tiny.vocab_size).mask()[None].float()
    samples = FamilySamples(tiny, split(tiny.model), members, {"a": [[3, 4]], "b": [[5]]}, SamplingOptions(40))
    found, _ = samples.contexts(6, 0)
    for family in found:
        assert family.states.shape == (6, 1, tiny.model.config.hidden_size)
        assert family.states.isfinite().all()
        torch.testing.assert_close(family.masses.sum(2), torch.ones(6, 1))


def test_contexts_are_texts_of_the_model_with_masses_of_the_base(tiny):
    tokens = TokenSet.contains(tiny.tokenizer, "e", vocab_size=tiny.vocab_size)
    members, base = tokens.mask()[None].float(), SplitModel(tiny.model)
    samples = FamilySamples(tiny, base, members, {"a": [[3, 4]], "b": [[5]]}, SamplingOptions(8))
    inside = samples.atoms.patterns[:, 0] == 1

    @contextmanager
    def base_only():
        """A base that gives every token the same mass."""
        weight = base.weight.clone()
        base.weight.data.zero_()
        yield
        base.weight.data.copy_(weight)

    found, rates = samples.contexts(10, 0)
    again, same = samples.contexts(10, 0, base_only)
    for family, flat in zip(found, again, strict=True):
        assert family.states.shape == (10, 8, tiny.model.config.hidden_size)
        expected = base.logits(family.states.float()).softmax(-1) @ members[0]
        torch.testing.assert_close(family.masses[..., inside].sum(2), expected.detach(), atol=5e-3, rtol=0.05)
        assert torch.equal(flat.states, family.states)
        assert flat.masses[..., inside].sum(2).std() < 1e-6 < family.masses[..., inside].sum(2).std()
    assert rates.shape == (2, 10, 1)
    assert torch.equal(rates, same)
