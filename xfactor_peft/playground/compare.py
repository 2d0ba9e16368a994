"""The tab that compares: the base and an adapter side by side, what they are about marked, its rate as it grows."""

from __future__ import annotations

import html
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from ..adapters.adapter import find_adapter, list_adapters, read_adapter
from ..adapters.fit import check_fits
from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from ..options import ChatOptions, SamplingOptions
from ..phrases.goals import patterns_of
from ..phrases.page import marked as marked_phrases
from ..sampling.generation import stream
from ..tokens.highlight import marked_parts
from ..tokens.patterns import found
from ..tokens.printable import counted
from ..tokens.token_set import TokenSet

NONE = "none"
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
"""Of everything that computes with the model, which all who look share. Each holds the bank's lock as well: what was
stopped computes on in its thread until its piece ends, and only then is its iterator closed."""
TO_ANSWERS = """() => {
    if (innerWidth < 640) document.getElementById("problem").scrollIntoView({behavior: "smooth"});
}"""
"""On a phone the answers are below the first screen: a click on Generate brings them into view."""


@dataclass(frozen=True)
class Column:
    """One text as it is now: HTML with set tokens marked, and a line with its R."""

    text: str = ""
    rates: str = ""


def continuations(
    bank: AdapterBank, prompt: str, names: list[str], weights: list[float], rate: float, options: SamplingOptions
) -> Iterator[tuple[Column, Column]]:
    """The base's and the adapted text, growing: first the base's, then the adapter's.

    The ids are those of `xfactor generate` with the same prompt, adapters, settings and seed.

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
    patterns = patterns_of(bank.load(name) for name in chosen)
    sets = [tokens for name in chosen if (tokens := bank.token_set(name)) is not None]
    if not (sets or patterns):
        sets = [TokenSet.contains(bank.base.tokenizer, "X", vocab_size=bank.base.vocab_size)]
    columns = [Column(), Column()]
    for index, what in enumerate((Mix(), mix)):
        bank.use(what)
        for ids in stream(bank.model, bank.base.tokenizer, prompt, options, chat=ChatOptions("auto")):
            text = cast(str, bank.base.tokenizer.decode(ids))
            counts = [f"R {tokens.share(ids):.3f} ({tokens.describe()})" for tokens in sets]
            if patterns:
                number = sum(len(found(pattern, text)) for pattern in patterns)
                counts.append(f"{counted(number, 'occurrence')} of {counted(len(patterns), 'pattern')}")
            shown = marked(bank, ids, sets) if sets else marked_phrases(patterns, text)
            columns[index] = Column(shown, f"{what}: {', '.join(counts)}, {len(ids)} tokens")
            yield columns[0], columns[1]


def marked(bank: AdapterBank, ids: list[int], sets: list[TokenSet]) -> str:
    """The text of `ids` as HTML, members of the sets in <mark>; without its tags it is the text, to the last space."""
    return "".join(
        _mark(text) if inside else html.escape(text) for text, inside in marked_parts(bank.base.tokenizer, ids, sets)
    )


def _mark(text: str) -> str:
    """The text marked, but for the space before it."""
    word = text.lstrip()
    return html.escape(text[: len(text) - len(word)]) + f"<mark>{html.escape(word)}</mark>" * bool(word)


def choices(bank: AdapterBank) -> tuple[list[str], dict[str, str]]:
    """Adapters that fit the base, and the others with the reason why they do not."""
    fitting, others = [], {}
    for name in list_adapters(bank.root):
        try:
            check_fits(read_adapter(find_adapter(name, bank.root)), bank.base)
            fitting.append(name)
        except XFactorError as error:
            others[name] = str(error)
    return fitting, others


def build(gr: Any, bank: AdapterBank) -> None:
    """The tab's parts and what they do, inside a `gradio.Blocks`."""
    fitting, others = choices(bank)
    prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, elem_id="prompt")
    with gr.Row():
        first = gr.Dropdown([NONE, *fitting], value=[NONE, *fitting][-1], label="Adapter", elem_id="adapter")
        one = gr.Slider(-1, 2, value=1.0, step=0.05, label="Scale", elem_id="scale")
        rate = gr.Slider(0, 0.99, value=0.0, step=0.01, label="Wanted rate (0: use the scale)", elem_id="rate")
    with gr.Row():
        button = gr.Button("Generate", variant="primary", elem_id="generate", min_width=140)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
    problem = gr.HTML(elem_id="problem", padding=False)
    with gr.Row():
        boxes = [part for name in ("base", "adapted") for part in _column(gr, name)]
    with gr.Accordion("A second adapter, sampling, other adapters", open=False, elem_id="more"):
        with gr.Row():
            second = gr.Dropdown([NONE, *fitting], value=NONE, label="Mixed with", elem_id="second")
            two = gr.Slider(-1, 2, value=1.0, step=0.05, label="Its scale")
        with gr.Row():
            length = gr.Slider(8, 256, value=64, step=8, label="Tokens", elem_id="length")
            temperature = gr.Slider(0, 2, value=1.0, step=0.05, label="Temperature (0: greedy)", elem_id="temperature")
            seed = gr.Number(0, precision=0, label="Seed", elem_id="seed")
        with gr.Row():
            new_seed = gr.Button("New seed", elem_id="new-seed")
            refresh = gr.Button("Look for new adapters", elem_id="refresh")
        rest = gr.HTML(_others(others), elem_id="others")

    def look() -> tuple[Any, Any, str]:
        fitting, others = choices(bank)
        return gr.update(choices=[NONE, *fitting]), gr.update(choices=[NONE, *fitting]), _others(others)

    settings = [prompt, first, one, second, two, rate, length, temperature, seed]
    started = gr.on(
        [button.click, prompt.submit], partial(_answers, bank), settings, [problem, *boxes], **ONE_AT_A_TIME
    )
    button.click(None, js=TO_ANSWERS)
    stop.click(None, cancels=[started])
    new_seed.click(lambda: secrets.randbelow(10**6), outputs=seed)
    refresh.click(look, outputs=[first, second, rest])


def _answers(bank: AdapterBank, prompt: str, *settings: Any) -> Iterator[tuple[str, ...]]:
    """What the page shows from a click on, or one line that says why there is nothing to show."""
    first, one, second, two, rate, length, temperature, seed = settings
    yield _page("", Column(), Column())
    try:
        options = SamplingOptions(max_new_tokens=int(length), temperature=temperature, seed=int(seed or 0))
        with bank.in_use:
            for shown in continuations(bank, prompt, [first, second], [one, two], rate, options):
                yield _page("", *shown)
    except XFactorError as error:
        yield _page(str(error), Column(), Column())


def _column(gr: Any, name: str) -> list[Any]:
    """The two parts of a column: its text, and its line of rates above it."""
    with gr.Column(min_width=300):
        rates = gr.HTML(f"<b>{name}</b>", elem_id=f"{name}-rate", elem_classes="rate", padding=False)
        text = gr.HTML(elem_id=f"{name}-text", container=True, padding=True)
    return [text, rates]


def said(problem: str) -> str:
    """A mistake as one line."""
    line = " ".join(problem.split()).replace("`", "")
    return f'<span class="problem">{html.escape(line)}</span>' if line else ""


def _page(problem: str, base: Column, adapted: Column) -> tuple[str, ...]:
    """The contents of the error line and of the two columns."""
    parts = [said(problem)]
    for name, column in (("base", base), ("adapted", adapted)):
        parts += [f'<div class="answer">{column.text}</div>', f"<b>{html.escape(column.rates or name)}</b>"]
    return tuple(parts)


def _others(others: dict[str, str]) -> str:
    """Adapters that cannot be chosen, grey, with the reason."""
    lines = (
        f"<li><b>{html.escape(name)}</b>: {html.escape(why.replace('`', ''))}</li>" for name, why in others.items()
    )
    return f'<div class="others">Not for this base:<ul>{"".join(lines)}</ul></div>' if others else ""
