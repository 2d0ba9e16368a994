"""The page: its tabs, its looks, and the server that it is on."""

from __future__ import annotations

import html
import importlib.util
import os
from typing import TYPE_CHECKING

from ..bank.bank import AdapterBank
from ..errors import XFactorError
from . import compare, teach_page

if TYPE_CHECKING:
    import gradio

CSS = """
footer {display: none !important}
.answer {white-space: pre-wrap; overflow-wrap: anywhere; min-height: 6em; line-height: 1.5}
.answer mark, .sample mark {background: #ffd54a; color: #000}
.rate {font-variant-numeric: tabular-nums}
.problem {color: #b00020; font-weight: 600}
.others {color: #888}
.pair {display: grid; grid-template-columns: 1fr 1fr; gap: .8em; margin: .3em 0 1em}
.pair.alone {grid-template-columns: 1fr}
.sample {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; border: 1px solid #8884; border-radius: 6px;
  padding: .5em .7em; user-select: text}
.before {opacity: .75}
.rates {border-collapse: collapse; font-variant-numeric: tabular-nums}
.rates th, .rates td {padding: .1em .9em .1em 0; text-align: right}
.rates th:first-child, .rates td:first-child {text-align: left; overflow-wrap: anywhere}
.bar {height: .5em; border-radius: 3px; background: #8883; overflow: hidden}
.bar div {height: 100%; background: #2e7d6b}
.commands {white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85em}
@media (max-width: 640px) {.gradio-container {padding: 8px !important} .answer {min-height: 3em}
  .pair {grid-template-columns: 1fr}}
"""


def require_gradio() -> None:
    """Raises XFactorError with the command that installs gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise XFactorError('the playground needs gradio: pip install "xfactor-peft[ui]"')


def build(bank: AdapterBank) -> gradio.Blocks:
    """The page; `bank` is shared by all who look at it, one at a time."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    with gr.Blocks(title="xfactor playground", analytics_enabled=False) as page:
        gr.Markdown("## xfactor playground")
        gr.HTML(padding=False, value=f"<small>{html.escape(bank.base.describe().replace('`', ''))}</small>")
        with gr.Tab("Compare", elem_id="compare"):
            compare.build(gr, bank)
        with gr.Tab("Teach by marking", elem_id="teach"):
            teach_page.build(gr, bank)
        page.load(None, js=teach_page.SELECTED)
    return page


def launch(bank: AdapterBank, host: str, port: int, *, block: bool = True) -> str:
    """Serve the page; returns its address. Nothing is fetched from other hosts, and no tunnel is opened.

    Raises:
        XFactorError: gradio is not installed, or the port is taken.
    """
    require_gradio()
    page = build(bank)
    import gradio as gr

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, theme=theme, css=CSS,
            prevent_thread_lock=not block,
        )  # fmt: skip
    except OSError as error:
        raise XFactorError(f"port {port} of {host} cannot be opened; choose another `port`") from error
    return address
