"""What was stopped still computes until its piece ends: nothing else of the page touches the model before that."""

import threading
import time
from types import SimpleNamespace

import pytest

from tests.playground.test_teach import PROMPTS, SHORT
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.playground import compare, teach_page
from xfactor_peft.playground import marks as marks_module
from xfactor_peft.playground.teach import Seen

LINES = "\n".join(PROMPTS)
GRADIO = SimpleNamespace(skip=lambda: None, update=lambda **_: None)


@pytest.fixture
def bank(tiny, adapters_root):
    return AdapterBank(tiny, adapters_root)


def answers(bank):
    return compare._answers(bank, "The fox", "x", 1.0, "none", 1.0, 0.0, 24, 1.0, 0)


def show(bank):
    yield
    yield teach_page._show(bank, LINES, "none", "", 16)


def teach(bank):
    return teach_page._teach(GRADIO, bank, threading.Event(), "the = 0", LINES, 8, "t", Seen())


def test_two_texts_never_grow_at_once(bank, monkeypatch):
    growing, together, stream = set(), [], compare.stream
    begin, before = threading.Barrier(2), bank.base.model.generation_config

    def watched(*arguments, **options):
        me = threading.get_ident()
        growing.add(me)
        for ids in stream(*arguments, **options):
            together.append(len(growing))
            time.sleep(0.02)
            yield ids
        growing.discard(me)

    def look():
        going = answers(bank)
        next(going)
        begin.wait(timeout=20)
        last.append(list(going)[-1])

    monkeypatch.setattr(compare, "stream", watched)
    last = []
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(together) == {1}
    assert len(last) == 2
    assert last[0] == last[1]
    assert bank.base.model.generation_config is before


@pytest.mark.parametrize("start", [answers, show, teach])
def test_each_waits_for_the_model_and_leaves_it_when_closed(bank, monkeypatch, start):
    """Also when another thread closes it, as gradio does."""
    monkeypatch.setattr(marks_module, "ROUND", SHORT)
    passes, going = [], start(bank)
    bank.base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    next(going)
    with bank.in_use:
        thread = threading.Thread(target=next, args=(going,))
        thread.start()
        time.sleep(0.3)
        assert passes == []
    thread.join(timeout=60)
    assert passes
    going.close()
    assert not bank.in_use.locked()
