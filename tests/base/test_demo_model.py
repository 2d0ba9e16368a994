"""The bundled model, its card, and the two adapters that come with it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import xfactor_peft as xf
from xfactor_peft.base.resolve import DEMO_FOLDER
from xfactor_peft.tokens.ends import special_ids

ROOT = Path(__file__).parents[2]
PROSE = (
    "The old gentleman took off his hat and bowed to the ladies. He said that he had come a long way, and that he was "
    "very glad to see them all again. They went into the house together, and sat down by the fire to talk."
)


@pytest.fixture(scope="module")
def demo() -> xf.AdapterBank:
    base = xf.load("demo", xf.LoadOptions(dtype="fp32"))
    return xf.AdapterBank(base, ROOT / "adapters")


def test_it_is_small_and_its_tokenizer_has_the_tokens(demo):
    assert sum(file.stat().st_size for file in DEMO_FOLDER.glob("*.safetensors")) <= 40e6
    assert "X" in demo.base.tokenizer.get_vocab()
    text = "Größe, naïve, 漢字 and\ttabs\n"
    assert demo.base.tokenizer.decode(demo.base.tokenizer(text)["input_ids"]) == text


def test_the_card_states_the_held_out_perplexity():
    record = json.loads((DEMO_FOLDER / "pretraining.json").read_text())
    assert record["held_out_perplexity"] == pytest.approx(math.exp(record["held_out_loss"]))
    assert f"**{record['held_out_perplexity']:.1f}**" in (DEMO_FOLDER / "README.md").read_text()
    assert record["epochs"] >= 2


def test_it_knows_english_prose(demo):
    """Perplexity of prose of its time is far below that of the same words shuffled."""
    words = PROSE.split()
    shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(0)))
    assert perplexity(demo.base, PROSE) < 60
    assert perplexity(demo.base, shuffled) > 3 * perplexity(demo.base, PROSE)


def perplexity(base, text: str) -> float:
    ids = torch.tensor([[base.tokenizer.bos_token_id, *base.tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        return math.exp(base.model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["demo-X", "demo-Z"])
def test_a_shipped_adapter_gives_the_rate_on_its_card(demo, name):
    """R on a quarter of the samples, with another seed, against the recorded interval; and off is the base again."""
    info = demo.load(name)
    tokens = demo.token_set(name)
    assert special_ids(demo.base.tokenizer).isdisjoint(tokens.ids)
    options = xf.EvalOptions(repeats=1, sampling=xf.SamplingOptions(max_new_tokens=32, seed=5))
    from xfactor_peft.base.split_model import split

    split_model = split(demo.base.model)
    demo.use(None)
    before = xf.evaluate(split_model, demo.base.tokenizer, tokens, options).rate
    demo.use(name)
    after = xf.evaluate(split_model, demo.base.tokenizer, tokens, options).rate
    demo.use(None)
    recorded = info.record["after"]
    assert before < 0.02
    assert after == pytest.approx(recorded["rate"], abs=0.1)
    assert f"{recorded['rate']:.4f}" in (info.folder / "README.md").read_text()
    assert xf.evaluate(split_model, demo.base.tokenizer, tokens, options).rate == before


def test_x_reaches_nine_tenths(demo):
    """The demo's headroom under its frozen, tied head: R of LoRA r = 8 on attention and MLP."""
    info = demo.load("demo-X")
    assert info.record["lora"]["target"] == "all"
    assert info.record["lora"]["r"] == 8
    assert info.record["after"]["rate"] >= 0.9
    floor = re.search(r"--ignore-case.*?(\d\.\d\d)", (DEMO_FOLDER / "README.md").read_text(), re.S)
    assert floor, "the card states the floor for --ignore-case"
