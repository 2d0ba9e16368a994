"""The playground, without and in a real browser."""

import shutil
import socket

import pytest

from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import SamplingOptions
from xfactor_peft.playground import MARK, continuations, launch

OPTIONS = SamplingOptions(max_new_tokens=24)


@pytest.fixture
def bank(tiny, adapters_root):
    return AdapterBank(tiny, adapters_root)


def test_text_and_rates_grow(bank):
    shown = list(continuations(bank, "The fox", ["x", "none"], [1.0, 1.0], 0.0, OPTIONS))
    assert len(shown) == 6
    lengths = [len("".join(text for text, _ in base)) for base, _, _, _ in shown[:3]]
    assert lengths == sorted(lengths)
    assert shown[0][2] == []
    base, base_rate, adapted, rate = shown[-1]
    assert base_rate.startswith("base: R 0.")
    assert rate.startswith("x: R ")
    assert "(contains 'X'), 24 tokens" in rate
    assert float(rate.split()[2]) > float(base_rate.split()[2]) + 0.3
    assert all("X" in text for text, label in adapted if label == MARK)
    assert not any("X" in text for text, label in [*adapted, *base] if label is None)


def test_scale_rate_and_mixes(bank):
    *_, last = continuations(bank, "The fox", ["x", "z"], [0.5, 0.25], 0.0, OPTIONS)
    assert last[3].startswith("x:0.5+z:0.25: R ")
    assert "contains 'Z'" in last[3]
    *_, last = continuations(bank, "The fox", ["none", "none"], [1.0, 1.0], 0.0, OPTIONS)
    assert last[0] == last[2]
    with pytest.raises(XFactorError, match="holds no dial"):
        next(continuations(bank, "The fox", ["x", "none"], [1.0, 1.0], 0.2, OPTIONS))
    with pytest.raises(XFactorError, match="a rate picks the scale of one adapter"):
        next(continuations(bank, "The fox", ["x", "z"], [1.0, 1.0], 0.2, OPTIONS))


def test_gradio_missing_is_one_line(bank, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(XFactorError, match=r'needs gradio: pip install "xfactor-peft\[ui\]"'):
        launch(bank, "127.0.0.1", 0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_in_a_browser(bank, tmp_path):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here")
    import gradio

    address = launch(bank, "127.0.0.1", free_port(), block=False)
    assert address.startswith("http://127.0.0.1:")
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            others, errors = [], []
            page.on(
                "request", lambda r: others.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
            )
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.locator("#prompt textarea").fill("The fox")
            page.locator("#length input[type=number]").fill("24")
            page.locator("#length input[type=number]").press("Tab")
            page.locator("#adapter input").click()
            page.get_by_role("option", name="x", exact=True).click()
            page.locator("#generate").click()
            adapted = page.locator("#adapted-rate")
            playwright.expect(adapted).to_contain_text("x: R 0.", timeout=30_000)
            playwright.expect(adapted).to_contain_text("24 tokens", timeout=30_000)
            marked = page.locator("#adapted-text").get_by_text("X")
            assert marked.count() > 0
            playwright.expect(page.locator("#base-rate")).to_contain_text("base: R 0.")
            page.screenshot(path=tmp_path / "playground.png", full_page=True)
            page.locator("#rate input[type=number]").fill("0.2")
            page.locator("#rate input[type=number]").press("Tab")
            page.locator("#generate").click()
            playwright.expect(page.get_by_text("holds no dial")).to_be_visible(timeout=30_000)
            assert errors == []
            assert others == []
            browser.close()
    finally:
        gradio.close_all()
    assert (tmp_path / "playground.png").stat().st_size > 10_000


def test_the_port_is_taken(bank):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(XFactorError, match="cannot be opened; choose another `port`"):
            launch(bank, "127.0.0.1", taken.getsockname()[1], block=False)


def test_help_says_where_it_listens(run):
    assert "127.0.0.1" in run("playground", "--help").output
