"""A page in the browser: the base and an adapter side by side, set tokens marked, R as it grows (extra `ui`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .adapters.adapter import list_adapters
from .adapters.mix import Mix
from .bank.bank import AdapterBank
from .errors import XFactorError
from .options import SamplingOptions
from .sampling.generation import stream
from .tokens.highlight import marked_parts
from .tokens.token_set import TokenSet

if TYPE_CHECKING:
    import gradio

NONE = "none"
MARK = "in the set"
CSS = "footer {display: none !important} .rate p {font-size: 1.3em}"


def continuations(
    bank: AdapterBank, prompt: str, names: list[str], weights: list[float], rate: float, options: SamplingOptions
) -> Iterator[tuple[list, str, list, str]]:
    """(marked base text, its R, marked adapted text, its R), growing: first the base's columns, then the adapter's.

    Args:
        names: up to two adapters; "none" is left out.
        weights: one a name.
        rate: above 0: in place of the weight, the scale of a single adapter whose measured rate it is.

    Raises:
        XFactorError: an adapter that does not fit, a rate without a dial, a prompt that is too long.
    """
    chosen = {name: weight for name, weight in zip(names, weights, strict=True) if name != NONE}
    for name in chosen:
        bank.load(name)
    if rate > 0:
        if len(chosen) != 1:
            raise XFactorError("a rate picks the scale of one adapter; choose one, or set the rate to 0")
        chosen = {name: bank.scale_for_rate(name, rate) for name in chosen}
    mix = Mix(tuple(chosen.items()))
    known = [found for name in chosen if (found := bank.token_set(name)) is not None]
    sets = known or [TokenSet.contains(bank.base.tokenizer, "X", vocab_size=bank.base.vocab_size)]
    columns: list[tuple[list[tuple[str, str | None]], str]] = [([], ""), ([], "")]
    for index, what in enumerate((Mix(), mix)):
        bank.use(what)
        for ids in stream(bank.model, bank.base.tokenizer, prompt, options):
            columns[index] = (_marked(bank, ids, sets), _rates(ids, sets, "base" if index == 0 else str(mix)))
            yield (*columns[0], *columns[1])


def _marked(bank: AdapterBank, ids: list[int], sets: list[TokenSet]) -> list[tuple[str, str | None]]:
    return [(text, MARK if inside else None) for text, inside in marked_parts(bank.base.tokenizer, ids, sets)]


def _rates(ids: list[int], sets: list[TokenSet], name: str) -> str:
    rates = ", ".join(f"R {tokens.share(ids):.3f} ({tokens.describe()})" for tokens in sets)
    return f"{name}: {rates}, {len(ids)} tokens"


def require_gradio() -> None:
    """Raises XFactorError with the command that installs gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise XFactorError('the playground needs gradio: pip install "xfactor-peft[ui]"')


def build(bank: AdapterBank) -> gradio.Blocks:
    """The page; `bank` is shared by all who look at it, one at a time."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    def run(
        prompt: str, first: str, one: float, second: str, two: float, rate: float, length: float, seed: float
    ) -> Any:
        options = SamplingOptions(max_new_tokens=int(length), seed=int(seed))
        try:
            yield from continuations(bank, prompt, [first, second], [one, two], rate, options)
        except XFactorError as error:
            raise gr.Error(str(error), duration=None) from error

    adapters = [NONE, *list_adapters(bank.root)]
    with gr.Blocks(title="xfactor playground", analytics_enabled=False) as page:
        gr.Markdown(f"# xfactor playground\n{bank.base.describe()}")
        prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            first = gr.Dropdown(adapters, value=adapters[-1], label="Adapter", elem_id="adapter")
            one = gr.Slider(-1, 2, value=1.0, step=0.05, label="Scale", elem_id="scale")
            second = gr.Dropdown(adapters, value=NONE, label="Mixed with")
            two = gr.Slider(-1, 2, value=1.0, step=0.05, label="Its scale")
        with gr.Row():
            rate = gr.Slider(0, 0.99, value=0.0, step=0.01, label="Wanted rate (0: use the scale)", elem_id="rate")
            length = gr.Slider(8, 256, value=64, step=8, label="Tokens", elem_id="length")
            seed = gr.Number(0, precision=0, label="Seed")
        button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Row():
            boxes = []
            for name in ("base", "adapted"):
                with gr.Column():
                    label = gr.Markdown(name, elem_id=f"{name}-rate", elem_classes="rate")
                    text = gr.HighlightedText(
                        label=name,
                        color_map={MARK: "#ffd54a"},
                        elem_id=f"{name}-text",
                        show_whitespaces=True,
                        show_inline_category=False,
                    )
                    boxes += [text, label]
        button.click(run, [prompt, first, one, second, two, rate, length, seed], boxes, concurrency_limit=1)
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
