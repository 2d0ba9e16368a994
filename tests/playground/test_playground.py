"""The playground, without and in a real browser."""

import html
import json
import re
import socket
import threading

import pytest

from tests.playground.conftest import opened, served
from tests.tiny import KINDS
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import SamplingOptions
from xfactor_peft.playground import compare, launch
from xfactor_peft.playground.compare import choices, continuations, marked
from xfactor_peft.tokens.highlight import marked_parts
from xfactor_peft.tokens.printable import printable
from xfactor_peft.tokens.token_set import TokenSet

OPTIONS = SamplingOptions(max_new_tokens=24)


@pytest.fixture
def bank(tiny, adapters_root):
    return AdapterBank(tiny, adapters_root)


def plain(text):
    """HTML without its tags, as a browser shows it."""
    return html.unescape(re.sub(r"</?mark>", "", text))


def test_text_and_rates_grow(bank):
    shown = list(continuations(bank, "The fox", ["x", "none"], [1.0, 1.0], 0.0, OPTIONS))
    assert len(shown) == 6
    lengths = [len(plain(base.text)) for base, _ in shown[:3]]
    assert lengths == sorted(lengths)
    assert shown[0][1].text == ""
    base, adapted = shown[-1]
    assert base.rates.startswith("base: R 0.")
    assert adapted.rates.startswith("x: R ")
    assert "(contains 'X'), 24 tokens" in adapted.rates
    assert float(adapted.rates.split()[2]) > float(base.rates.split()[2]) + 0.3
    assert all("X" in part for part in re.findall("<mark>(.*?)</mark>", adapted.text, re.S))
    assert "X" not in re.sub("<mark>.*?</mark>", "", adapted.text + base.text, flags=re.S)


def test_the_text_is_that_of_generate(bank, run, tiny_folders, adapters_root):
    """To the last space, with the same seed, under the same adapter and scale."""
    *_, (base, adapted) = continuations(bank, "The fox", ["x", "none"], [0.5, 1.0], 0.0, OPTIONS)
    words = ["--adapter", "none", "--adapter", "x:0.5", "--adapters-dir", adapters_root, "--dtype", "fp32"]
    printed = json.loads(run("generate", *words, "--max-new-tokens", 24, "--json", "The fox").stdout)
    assert [printable(part["text"]) for part in printed] == [plain(base.text), plain(adapted.text)]
    assert plain(base.text) != plain(adapted.text)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_text(tiny_folders, load_tiny, kind):
    """No part has a space of its own, and none is lost; a character of several tokens stays whole."""
    base = load_tiny(kind)
    ids = base.tokenizer("The ox — naïve Xavier's ☃ taxi <b> Zoe")["input_ids"]
    odd = TokenSet.token_ids(base.tokenizer, sorted(set(ids[1::2])), vocab_size=base.vocab_size)
    parts = marked_parts(base.tokenizer, ids, [odd])
    assert "".join(text for text, _ in parts) == base.tokenizer.decode(ids)
    assert len(parts) > 5
    assert any("☃" in text for text, _ in parts)


def test_text_is_escaped(bank):
    ids = bank.base.tokenizer("a <b>X</b> & X")["input_ids"]
    text = marked(bank, ids, [TokenSet.contains(bank.base.tokenizer, "X")])
    assert "<b>" not in text
    assert plain(text) == bank.base.tokenizer.decode(ids)
    assert not re.search(r"<mark>\s", text)


def test_adapters_of_other_bases_are_named_with_the_reason(load_tiny, adapters_root):
    assert choices(AdapterBank(load_tiny(), adapters_root)) == (["head", "x", "z"], {})
    fitting, others = choices(AdapterBank(load_tiny("llama"), adapters_root))
    assert fitting == []
    assert all("made for" in reason for reason in others.values())
    assert others.keys() == {"head", "x", "z"}


def test_scale_rate_and_mixes(bank):
    *_, last = continuations(bank, "The fox", ["x", "z"], [0.5, 0.25], 0.0, OPTIONS)
    assert last[1].rates.startswith("x:0.5+z:0.25: R ")
    assert "contains 'Z'" in last[1].rates
    *_, last = continuations(bank, "The fox", ["none", "none"], [1.0, 1.0], 0.0, OPTIONS)
    assert last[0] == last[1]
    with pytest.raises(XFactorError, match="holds no dial"):
        next(continuations(bank, "The fox", ["x", "none"], [1.0, 1.0], 0.2, OPTIONS))
    with pytest.raises(XFactorError, match="a rate picks the scale of one adapter"):
        next(continuations(bank, "The fox", ["x", "z"], [1.0, 1.0], 0.2, OPTIONS))


def test_gradio_missing_is_one_line(bank, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(XFactorError, match=r'needs gradio: pip install "xfactor-peft\[ui\]"'):
        launch(bank, "127.0.0.1", 0)


def test_in_a_browser(bank, browser, tmp_path):
    """On a desk and on a phone: texts, marks, one line for a mistake over empty texts, nothing from other hosts."""
    chromium, expect = browser
    with served(bank) as address:
        for width in (1280, 390):
            with opened(chromium, address, width) as page:
                browse(page, expect)


def browse(page, expect):
    page.locator("#prompt textarea").fill("The fox")
    page.locator("#adapter input").click()
    page.get_by_role("option", name="x", exact=True).click()
    page.locator("#generate").click()
    adapted, text = page.locator("#adapted-rate"), page.locator("#adapted-text .answer")
    expect(adapted).to_contain_text("64 tokens", timeout=30_000)
    expect(adapted).to_contain_text("x: R 0.")
    expect(page.locator("#base-rate")).to_contain_text("base: R 0.")
    expect(page.locator("#base-text")).to_be_in_viewport()
    assert "X" in text.locator("mark").first.inner_text()
    page.locator("#rate input[type=number]").fill("0.2")
    page.locator("#rate input[type=number]").press("Tab")
    page.locator("#generate").click()
    expect(page.locator(".problem")).to_contain_text("holds no dial", timeout=30_000)
    assert page.locator(".problem").count() == 1
    expect(text).to_be_empty()
    page.locator("#more button").first.click()
    page.locator("#new-seed").click()
    expect(page.locator("#seed input")).not_to_have_value("0")
    page.locator("#refresh").click()


def test_stop_ends_a_text_where_it_is(bank, browser, monkeypatch):
    """And the next one begins at once, as the first would have."""
    chromium, expect = browser
    more, slow = threading.Event(), compare.stream

    def waits(*arguments, **options):
        for number, ids in enumerate(slow(*arguments, **options)):
            more.wait(timeout=20) if number else None
            yield ids

    monkeypatch.setattr(compare, "stream", waits)
    with served(bank) as address, opened(chromium, address, 1280) as page:
        page.locator("#generate").click()
        expect(page.locator("#base-rate")).to_contain_text("8 tokens", timeout=30_000)
        page.locator("#stop").click()
        page.wait_for_timeout(300)
        more.set()
        page.wait_for_timeout(700)
        expect(page.locator("#base-rate")).not_to_contain_text("64 tokens")
        page.locator("#generate").click()
        expect(page.locator("#adapted-rate")).to_contain_text("64 tokens", timeout=30_000)


def test_the_port_is_taken(bank):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(XFactorError, match="cannot be opened; choose another `port`"):
            launch(bank, "127.0.0.1", taken.getsockname()[1], block=False)


def test_help_says_where_it_listens(run):
    assert "127.0.0.1" in run("playground", "--help").output
