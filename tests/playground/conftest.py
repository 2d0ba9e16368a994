"""A real browser, where there is one, for the tests of the page."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xfactor_peft.playground import launch


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser, playwright.expect
        browser.close()


@contextmanager
def served(bank) -> Iterator[str]:
    """The address of the page of a bank."""
    import gradio

    address = launch(bank, "127.0.0.1", free_port(), block=False)
    try:
        yield address
    finally:
        gradio.close_all()


@contextmanager
def opened(browser, address, width):
    """The page at this width; at the end it has raised no error and asked no other host for anything."""
    page = browser.new_page(viewport={"width": width, "height": 844})
    others, errors = [], []
    ours = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(ours) else others.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    try:
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (errors, others) == ([], [])
    finally:
        page.close()
