"""What ends a text, what is special, what pads: one answer, and everything that generates asks for it."""

from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.tiny import tiny_tokenizer
from xfactor_peft.options import SamplingOptions
from xfactor_peft.sampling.contexts import allowed_ids, file_contexts, self_contexts
from xfactor_peft.sampling.generation import encode_prompt, generate, generate_batch, stream, unused_settings
from xfactor_peft.tokens.ends import end_ids, pad_id, special_ids, text_ids, until_end

OPTIONS = SamplingOptions(max_new_tokens=20, seed=4)


@pytest.fixture
def free(load_tiny):
    """A model that ends nothing, and what it generates."""
    base = load_tiny()
    base.tokenizer.eos_token = None
    base.model.generation_config.eos_token_id = None
    return base, generate(base.model, base.tokenizer, "The fox", OPTIONS)


def test_ends_come_from_both_places(tiny):
    end = tiny.tokenizer.eos_token_id
    assert end_ids(tiny.tokenizer, tiny.model) == [end]
    for named, expected in (([7, 9], [end, 7, 9]), (7, [end, 7]), (None, [end]), ([7, 10**6], [end, 7])):
        tiny.model.generation_config.eos_token_id = named
        assert end_ids(tiny.tokenizer, tiny.model) == sorted(expected)
    assert special_ids(tiny.tokenizer) == {end}
    assert special_ids(tiny.tokenizer, tiny.model) == {end, 7}
    assert 7 not in allowed_ids(tiny)
    assert until_end([1, 2, 7, 3, 9], [9, 7]) == [1, 2]
    assert until_end([1, 2], [9]) == [1, 2]


@pytest.mark.parametrize("place", [0, 7, 12])
def test_every_end_ends_every_way_of_generating(free, place):
    base, whole = free
    assert len(whole) == 20
    base.model.generation_config.eos_token_id = [383, whole[place]]
    expected = until_end(whole, [whole[place]])
    assert generate(base.model, base.tokenizer, "The fox", OPTIONS) == expected
    assert list(stream(base.model, base.tokenizer, "The fox", OPTIONS))[-1] == expected
    assert generate_batch(base.model, base.tokenizer, ["The fox"], OPTIONS) == [expected]


def test_no_end_is_in_the_contexts(free):
    base, _ = free
    drawn = self_contexts(base, 40, 40)
    common = int(drawn.flatten().bincount().argmax())
    base.model.generation_config.eos_token_id = [383, common]
    assert not torch.isin(self_contexts(base, 40, 40), torch.tensor([383, common])).any()


def test_a_padding_token_inside_a_text_stays(free):
    """One that is an ordinary id: it pads, and when the model writes it, it is text."""
    base, whole = free
    base.tokenizer.pad_token = base.tokenizer.convert_ids_to_tokens(whole[3])
    assert pad_id(base.tokenizer, base.model) == whole[3]
    assert generate(base.model, base.tokenizer, "The fox", OPTIONS) == whole
    short = replace(OPTIONS, temperature=0.0)
    prompts = ["The fox", "In the house there was an old woman"]
    alone = [generate(base.model, base.tokenizer, prompt, short) for prompt in prompts]
    assert generate_batch(base.model, base.tokenizer, prompts, short) == alone


def test_padding_where_nothing_says_what_pads(free):
    base, _ = free
    assert base.tokenizer.pad_token is None
    assert pad_id(base.tokenizer, base.model) == 0
    base.model.generation_config.pad_token_id = 5
    assert pad_id(base.tokenizer, base.model) == 5
    options = replace(OPTIONS, temperature=0.0)
    prompts = ["The fox", "In the house there was an old woman"]
    alone = [generate(base.model, base.tokenizer, prompt, options) for prompt in prompts]
    assert generate_batch(base.model, base.tokenizer, prompts, options) == alone


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before"),
    [("$A <|endoftext|>", 0), ("<|endoftext|> $A <|endoftext|>", 1), ("<|endoftext|> $A", 1), ("$A", 0)],
)
def test_an_end_that_the_tokenizer_appends_is_no_part_of_a_prompt(tiny, tmp_path, template, before):
    tokenizer = with_template(template)
    plain, end = tiny_tokenizer()("The fox")["input_ids"], tokenizer.eos_token_id
    assert text_ids(tokenizer, "The fox") == [end] * before + plain
    assert encode_prompt(tokenizer, tiny.model, "The fox", 5) == [end] * before + plain
    assert encode_prompt(tokenizer, tiny.model, "", 5) == [end]
    path = tmp_path / "text"
    path.write_text("The fox")
    tiny.tokenizer = tokenizer
    assert file_contexts(tiny, path, len(plain) + before).tolist() == [[end] * before + plain]


def test_the_checkpoint_s_own_decoding_settings_change_nothing(tiny, adapters_root):
    """Neither for the base nor under adapters, and they are there again afterwards; R would be another otherwise."""
    from xfactor_peft.bank.bank import AdapterBank

    greedy = replace(OPTIONS, temperature=0.0)
    bank = AdapterBank(tiny, adapters_root)
    bank.load("x")
    expected = {}
    for name in (None, "x"):
        bank.use(name)
        expected[name] = [bank.generate("The fox", options) for options in (OPTIONS, greedy)]
    settings = {"repetition_penalty": 5.0, "min_p": 0.5, "num_beams": 3, "bad_words_ids": [[expected["x"][0][0]]],
                "no_repeat_ngram_size": 1, "top_k": 2, "temperature": 0.1, "do_sample": False}  # fmt: skip
    tiny.model.generation_config.update(**settings)
    for name in (None, "x"):
        bank.use(name)
        assert [bank.generate("The fox", options) for options in (OPTIONS, greedy)] == expected[name]
        assert len(bank.generate_batch([("The fox", name)], OPTIONS)[0]) == len(expected[name][0])
    assert tiny.model.generation_config.num_beams == 3
    assert unused_settings(tiny.model).items() >= {"repetition_penalty": 5.0, "min_p": 0.5, "num_beams": 3}.items()
    prompt = torch.tensor([tiny.tokenizer("The fox")["input_ids"]])
    with bank.base_only():
        alone = tiny.model.generate(prompt, max_new_tokens=20, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    assert alone != expected[None][1]  # transformers alone would have applied them


def test_an_export_marks_every_special_token(tiny):
    """In the export's own list of kinds, added special tokens that have no role among the six of the tokenizer too."""
    gguf = pytest.importorskip("gguf")
    from xfactor_peft.export.gguf_model import _add_vocabulary

    kinds = {}

    class Writer:
        def __getattr__(self, name):
            return lambda *values, **_: kinds.setdefault(name, values)

    from tokenizers import AddedToken

    tiny.tokenizer.add_tokens([AddedToken("fox", special=True)], special_tokens=True)
    _add_vocabulary(Writer(), tiny.model, tiny.tokenizer, "gpt-2")
    marked = {i for i, kind in enumerate(kinds["add_token_types"][0]) if kind == gguf.TokenType.CONTROL}
    assert marked == special_ids(tiny.tokenizer, tiny.model)
    assert len(marked) >= 1
