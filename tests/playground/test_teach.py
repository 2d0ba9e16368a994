"""Teaching by marking: marks, a round without a browser, and a whole round in one."""

import json
import re
import threading
from dataclasses import replace

import pytest
import torch

from tests.playground.conftest import opened, served
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import PhraseOptions, SamplingOptions
from xfactor_peft.phrases.rules import read_rules
from xfactor_peft.playground import marks as marks_module
from xfactor_peft.playground import teach_page
from xfactor_peft.playground.compare import continuations
from xfactor_peft.playground.marks import goals_of, like_text, marked_with, marks_of, rules_of
from xfactor_peft.playground.teach import (
    WAIT,
    Doing,
    Taught,
    commands,
    next_name,
    plan,
    samples,
    teach,
    texts_in_time,
    works,
)
from xfactor_peft.progress import phase

PROMPTS = ["The fox", "Once", "A cat", "In the house"]
SHORT = PhraseOptions(texts=8, length=24, eval_texts=8, epochs=4, trunk_epochs=1, lr=0.01)
TEXTS = ["A rich tapestry of colours, she said.", "The colours — a testament to rich tapestries."]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(marks_module, "ROUND", SHORT)


def wanted(marks):
    return {p.text: (goal.wanted.value, goal.wanted.unit) for goal in goals_of(marks) for p in goal.patterns}


def test_marks_are_goals():
    marks = "tapestry = 0\n\na testament to = x0.3\ndelv* = 0.5/1000w\nchars:— = x0.5\nscript:Han=0\na = b = 0"
    assert wanted(marks) == {
        "tapestry": (0, "x"), "a testament to": (0.3, "x"), "delv*": (0.5, "w"), "—": (0.5, "x"), "Han": (0, "x"),
        "a = b": (0, "x"),
    }  # fmt: skip
    assert [goal.name for goal in goals_of(marks)] == ["never", "a testament to", "delv*", "chars —", "script Han"]
    assert [goal.hard for goal in goals_of(marks)] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ("", "nothing is marked yet"),
        ("tapestry", "is no mark; write PHRASE = RATE"),
        ("tapestry = much", "is no rate of phrases"),
        ("tapestry = 0\ntapestry = x2", "leave it in one"),
        ("script:Klingon = 0", "knows no script"),
    ],
)
def test_what_is_no_mark_is_said(marks, says):
    with pytest.raises(XFactorError, match=says):
        rules_of(marks, PROMPTS, 8)


def test_no_mark_names_a_file_of_the_server():
    """A page may be open to others; only the command line reads lists."""
    assert wanted("phrases:/etc/passwd = 0") == {"phrases:/etc/passwd": (0, "x")}


def test_what_is_selected_is_marked_in_whole_words():
    assert marked_with("", " tapestry  of ", "0", TEXTS) == "tapestry of = 0"
    assert marked_with("", "apestry", "0", TEXTS) == "tapestry = 0"
    assert marked_with("", "estament\nt", "x0.3", TEXTS) == "testament to = x0.3"
    assert marked_with("", "“colours,”", "0", TEXTS) == "colours = 0"
    assert marked_with("", "—", "0", TEXTS) == "chars:— = 0"
    assert marked_with("", "colour*", "0", TEXTS) == "colour* = 0"
    assert marked_with("", "unseen", "0", TEXTS) == "unseen = 0"
    assert marked_with("", "sea", "0", ["research"]) == "sea = 0"  # typed, and in no text
    with pytest.raises(XFactorError, match="select a word"):
        marked_with("", "  ", "0", TEXTS)


def test_marked_again_multiplies():
    once = marked_with("a = 0", "Tapestry", "x0.3", TEXTS)
    assert wanted(marked_with(once, "tapestry", "x0.3", TEXTS)) == {"a": (0, "x"), "tapestry": (0.09, "x")}
    assert wanted(marked_with(once, "tapestry", "0", TEXTS)) == {"a": (0, "x"), "tapestry": (0, "x")}
    assert wanted(marked_with("a = 0", "A", "x2")) == {"A": (2, "x")}
    assert wanted(marked_with("a = 0.5/1000w", "a", "x2")) == {"a": (1.0, "w")}


def test_rates_of_a_text(tmp_path):
    path = tmp_path / "people.txt"
    path.write_text("We went to the sea and the sea was there. " * 200)
    rates = wanted(like_text("the = x2\nmoon = 0", path, []))
    assert rates["the"] == (pytest.approx(200, rel=0.02), "w")
    assert 0 < rates["moon"][0] < 1
    assert "tapestry" in wanted(like_text("", path, ["the sea, the tapestry, tapestry and more tapestry"]))
    path.write_text("too short")
    with pytest.raises(XFactorError, match="too few to measure"):
        like_text("the = 0", path, [])


def test_prompts_are_held_out():
    rules = rules_of("a = 0", PROMPTS, 8)
    assert (rules.prompts, rules.held_out) == (("The fox", "A cat"), ("Once", "In the house"))
    rules = rules_of("a = 0", PROMPTS[:2], 8)
    assert rules.held_out == ("The fox", "Once")
    assert len(rules.prompts) == 64


def test_names_are_new_and_stay_inside(tmp_path):
    assert next_name(tmp_path, "taught") == "taught-1"
    (tmp_path / "taught-1").mkdir()
    assert next_name(tmp_path, "taught") == "taught-2"
    for name in ("", "../up", "a/b", ".hidden"):
        with pytest.raises(XFactorError, match="cannot name an adapter"):
            next_name(tmp_path, name)


def logits(base):
    with torch.no_grad():
        return base.model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.fixture(scope="module")
def taught(load_tiny, tmp_path_factory, adapters_root):
    """A round on a bank that has shown another adapter before: (bank, what came, logits before)."""
    root = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks_module, "ROUND", SHORT)
        bank = AdapterBank(load_tiny(), root)
        before = logits(bank.base)
        bank.load(str(adapters_root / "x"))
        rules = rules_of("*e* = 0\nfox = x2", PROMPTS, 8)
        return bank, list(teach(bank, rules, "taught-1", threading.Event())), before


def test_a_round_ends_in_an_adapter(taught):
    bank, news, before = taught
    doing, last = [one for one in news if isinstance(one, Doing)], news[-1]
    assert isinstance(last, Taught)
    shares = [one.share for one in doing]
    assert shares == sorted(shares)
    assert {one.phase for one in doing} <= works(last.rules).keys()
    assert last.before.counts[0] > last.after.counts[0]
    assert torch.equal(logits(bank.base), before)  # the base is as it was, without a second copy
    assert not any("lora" in name for name, _ in bank.base.model.named_modules())
    seen = samples(bank, PROMPTS, "taught-1")
    assert seen.adapter == "taught-1"
    assert seen.texts != samples(bank, PROMPTS).texts
    *_, (_, adapted) = continuations(bank, "The fox", ["taught-1", "none"], [1.0, 1.0], 0.0, SamplingOptions(8))
    assert re.search(r"taught-1: \d occurrences? of 2 patterns, 8 tokens", adapted.rates)
    *_, (base, adapted) = continuations(bank, "The fox", ["taught-1", "none"], [0.0, 1.0], 0.0, SamplingOptions(64))
    assert base.text == adapted.text
    assert "<mark>e</mark>" in base.text
    assert marks_of(bank.load("taught-1")) == "*e* = 0\nfox = x2"


def test_the_commands_make_it_again(taught, run):
    bank, *_ = taught
    folder = bank.root / "taught-1"
    assert read_rules(folder / "rules.yaml") == read_rules(folder / "xfactor.json")
    words = commands(bank.base, bank.root, "taught-1")[0].split()
    assert words[:2] == ["xfactor", "train"]
    run(*words[1:])
    again = bank.root / "taught-1-again"
    first, second = (json.loads((at / "xfactor.json").read_text()) for at in (folder, again))
    assert first["sha256"]["adapter_model.safetensors"] == second["sha256"]["adapter_model.safetensors"]


@pytest.mark.parametrize("where", ["measuring the base", "learning, round 1", "measuring the adapter"])
def test_stopped_means_nothing_is_written(tiny, tmp_path, short, where):
    bank, stop, news = AdapterBank(tiny, tmp_path), threading.Event(), []
    before = logits(tiny)
    for one in teach(bank, rules_of("the = 0", PROMPTS, 8), "t-1", stop):
        news.append(one)
        if one.phase == where:
            stop.set()
    assert all(isinstance(one, Doing) for one in news)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(tiny), before)


def test_a_page_that_is_closed_stops_it(tiny, tmp_path, short):
    going = teach(AdapterBank(tiny, tmp_path), rules_of("the = 0", PROMPTS, 8), "t-1", threading.Event())
    next(going)
    going.close()
    assert list(tmp_path.iterdir()) == []
    assert not any("lora" in name for name, _ in tiny.model.named_modules())


@pytest.mark.parametrize(("error", "says"), [(XFactorError("never said"), "never said"), (MemoryError(), "memory ran")])
def test_what_goes_wrong_is_one_error(tiny, tmp_path, short, monkeypatch, error, says):
    def fails(*_):
        with phase("learning, round 1"):
            raise error

    monkeypatch.setattr("xfactor_peft.playground.teach.train_phrases", fails)
    with pytest.raises(XFactorError, match=says):
        list(teach(AdapterBank(tiny, tmp_path), rules_of("the = 0", PROMPTS, 8), "t-1", threading.Event()))


def test_a_plan_says_time_and_memory(tiny, short):
    rules = rules_of("the = 0", PROMPTS, 8)
    assert "about 5 seconds" in plan(tiny, rules, 1e-4)
    assert "about 4 minutes" in plan(tiny, rules, 240 / sum(works(rules).values()) / 1.05)
    assert "MiB" in plan(tiny, rules, 1e-4)
    assert works(rules_of("script:Han = 0", PROMPTS, 8)).keys() == {"measuring the base", "measuring the adapter"}


def test_a_slow_machine_learns_from_fewer_texts():
    """So that a round is waited for at most five minutes, and never from fewer than a rate can be seen in."""
    for pace in (1e-4, 0.01, 0.02, 0.04):
        texts = texts_in_time(PROMPTS, pace)
        assert texts % 8 == 0
        assert 16 <= texts <= 64
        seconds = pace * sum(works(rules_of("the = x0.5", PROMPTS, texts)).values())
        assert texts == 16 or seconds <= WAIT
        assert texts == 64 or pace * sum(works(rules_of("the = x0.5", PROMPTS, texts + 8)).values()) > WAIT
    assert WAIT < 300
    assert texts_in_time(PROMPTS, 1e-4) == 64
    assert texts_in_time(PROMPTS, 1.0) == 16


def test_texts_are_escaped_on_the_page():
    seen = teach_page.Seen((("<b>prompt</b>", "a <script>alert(1)</script> fox"),), "x")
    shown = teach_page._texts(goals_of("script = 0")[0].patterns, replace(seen, before=seen))
    assert "<script>" not in shown
    assert "<b>prompt" not in shown
    assert "&lt;<mark>script</mark>&gt;" in shown


def test_a_round_in_a_browser(load_tiny, browser, tmp_path, short):
    """Texts are looked at, a word of theirs is selected and marked, taught, stopped, taught again, and compared."""
    root, people = tmp_path / "adapters", tmp_path / "people.txt"
    base = load_tiny()
    chromium, expect = browser
    with served(AdapterBank(base, root)) as address, opened(chromium, address, 1280) as page:
        page.get_by_role("tab", name="Teach by marking").click()
        page.locator("#prompts textarea").fill("\n".join(PROMPTS))
        page.locator("#start").click()
        expect(page.locator("#teach-problem .problem")).to_contain_text("nothing is marked yet")
        page.locator("#show").click()
        text = page.locator("#texts .sample").first
        expect(text).not_to_be_empty(timeout=30_000)
        text.select_text()
        expect(page.locator("#phrase textarea, #phrase input").first).not_to_have_value("")
        page.locator("#phrase textarea, #phrase input").first.fill("*e*")
        page.locator("#mark-never").click()
        marks = page.locator("#marks textarea")
        expect(marks).to_have_value("*e* = 0")
        expect(page.locator("#teach-problem .problem")).to_have_count(0)
        assert "e" in page.locator("#texts .sample mark").first.inner_text()  # at once, in the texts that are there
        expect(page.locator("#plan")).to_contain_text("A round takes about")
        expect(page.locator("#plan")).to_contain_text("learns after 2 prompts")
        page.locator("#start").click()
        expect(page.locator("#doing")).to_contain_text("of the round")
        page.locator("#teach-stop").click()
        expect(page.locator("#doing")).to_contain_text("stopped; nothing was written", timeout=30_000)
        assert not root.exists()
        page.locator("#start").click()
        expect(page.locator("#outcome")).to_contain_text("taught-1", timeout=60_000)
        expect(page.locator("#outcome")).to_contain_text("--rules")
        expect(page.locator("#outcome table")).to_contain_text("never")
        expect(page.locator("#texts .pair .sample")).to_have_count(2 * len(PROMPTS))
        expect(page.locator("#writer input")).to_have_value("taught-1")
        assert "e" in page.locator("#texts .before mark").first.inner_text()
        expect(marks).to_have_value("*e* = 0")  # the next round starts from here
        people.write_text("We see the sea. " * 300)
        page.locator("#like input[type=file]").set_input_files(people)
        expect(marks).to_have_value("*e* = 1250/1000w")
        page.locator("#show").click()
        expect(page.locator("#texts .pair.alone .sample")).to_have_count(len(PROMPTS), timeout=30_000)
        expect(page.locator("#teach-problem .problem")).to_have_count(0)
    assert (root / "taught-1" / "rules.yaml").is_file()
