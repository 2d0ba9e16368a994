"""The tab that teaches: texts to mark, the marks, the plan, training as it goes, and the same prompts afterwards."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import find_adapter, read_adapter
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from ..phrases.lists import writing_prompts
from ..phrases.page import marked
from ..tokens.patterns import Pattern, names
from ..tokens.printable import counted, printable
from .compare import NONE, ONE_AT_A_TIME, choices, said
from .marks import LESS, MORE, NEVER, ROUND, goals_of, like_text, marked_with, marks_of, prompts_of, rules_of
from .teach import RULES, STEP, Doing, Seen, Taught, commands, next_name, pace_of, plan, samples, teach, texts_in_time

SELECTED = """() => document.addEventListener("selectionchange", () => {
    const text = getSelection().toString().trim(), node = getSelection().anchorNode;
    const from = node && (node.nodeType === 1 ? node : node.parentElement);
    const field = document.querySelector("#phrase textarea, #phrase input");
    if (!text || !from || !from.closest(".sample") || !field) return;
    field.value = text;
    field.dispatchEvent(new Event("input", {bubbles: true}));
})"""
"""What is selected in a text stands in the field above the marks, ready for less, more or never."""
OPENINGS = (
    "Once upon a time",
    "The captain stood on the deck and",
    "It was a dark and stormy night;",
    "My dear friend,",
)
PROMPTS = 8
MOST_TEXTS = 96
"""A round is waited for; a longer run is for the command line, with the rule file."""


def build(gr: Any, bank: AdapterBank) -> None:
    """The tab's parts and what they do, inside a `gradio.Blocks`."""
    stop, seen, pace = threading.Event(), gr.State(Seen()), gr.State(0.0)
    with gr.Row():
        prompts = gr.Textbox(_first_prompts(bank), label="Prompts, one a line", lines=4, max_lines=8, elem_id="prompts",
                             scale=3)  # fmt: skip
        with gr.Column(scale=1, min_width=200):
            adapter = gr.Dropdown([NONE, *choices(bank)[0]], value=NONE, label="Texts of", elem_id="writer")
            show = gr.Button("Show texts", variant="primary", elem_id="show")
    problem = gr.HTML(elem_id="teach-problem", padding=False)
    texts = gr.HTML(elem_id="texts", padding=False)
    with gr.Row(equal_height=True):
        phrase = gr.Textbox(label="Select words in a text, or type them", elem_id="phrase", scale=3)
        how = {
            rate: gr.Button(name if rate == NEVER else f"{name} ({rate})", elem_id=f"mark-{name}", min_width=90)
            for name, rate in (("less", LESS), ("more", MORE), ("never", NEVER))
        }
    with gr.Row():
        marks = gr.Textbox(label="Marks: phrase = rate. 0 is never, x0.3 a factor, 0.5/1000w in 1,000 words", lines=4,
                           max_lines=12, elem_id="marks", scale=3)  # fmt: skip
        like = gr.File(label="A text to be like", file_types=[".txt", ".md"], elem_id="like", height=140)
    with gr.Row():
        count = gr.Slider(16, MOST_TEXTS, value=ROUND.texts, step=STEP, label="Texts to learn from", elem_id="count")
        name = gr.Textbox("taught", label="Name of the adapter", elem_id="name")
    planned = gr.HTML(elem_id="plan", padding=False)
    with gr.Row():
        start = gr.Button("Teach", variant="primary", elem_id="start", min_width=140)
        end = gr.Button("Stop", elem_id="teach-stop", min_width=80)
    doing = gr.HTML(elem_id="doing", padding=False)
    outcome = gr.HTML(elem_id="outcome", padding=False)

    shown = [problem, texts, seen, pace, count]
    show.click(partial(_show, bank), [prompts, adapter, marks, count], shown, **ONE_AT_A_TIME)
    adapter.input(partial(_adapter_marks, bank), [adapter, marks], [problem, marks])
    marks.change(lambda marks, seen: _texts(_patterns(marks), seen), [marks, seen], texts, show_progress="hidden")
    for rate, button in how.items():
        button.click(partial(_mark, rate), [marks, phrase, seen], [problem, marks, phrase], show_progress="hidden")
    like.upload(_like, [marks, like, seen], [problem, marks])
    gr.on(
        [part.change for part in (marks, count, prompts, pace)], partial(_plan, bank), [marks, prompts, count, pace],
        planned, show_progress="hidden",
    )  # fmt: skip
    parts = [problem, texts, seen, doing, outcome, adapter]
    start.click(partial(_teach, gr, bank, stop), [marks, prompts, count, name, seen], parts, **ONE_AT_A_TIME)
    end.click(stop.set)


def _first_prompts(bank: AdapterBank) -> str:
    """Questions for a chat model, openings for others."""
    chat = getattr(bank.base.tokenizer, "chat_template", None) is not None
    return "\n".join(writing_prompts()[0][:PROMPTS] if chat else OPENINGS)


def _show(bank: AdapterBank, prompts: str, adapter: str, marks: str, count: int) -> tuple[str, str, Seen, float, int]:
    """The texts, and how many a round learns from: on a slow machine fewer than asked for.

    All at once: a click on *Teach* between the two would have learnt from as many as were asked for.
    """
    try:
        with bank.in_use:
            seen = samples(bank, prompts_of(prompts), "" if adapter == NONE else adapter)
            pace = pace_of(bank.base, seen.prompts)
        return "", _texts(_patterns(marks), seen), seen, pace, min(count, texts_in_time(seen.prompts, pace))
    except XFactorError as error:
        return said(str(error)), "", Seen(), 0.0, count


def _adapter_marks(bank: AdapterBank, adapter: str, marks: str) -> tuple[str, str]:
    """The marks that the adapter was made by, where it was, in place of those there."""
    try:
        known = "" if adapter == NONE else marks_of(read_adapter(find_adapter(adapter, bank.root)))
    except XFactorError as error:
        return said(str(error)), marks
    return "", known or marks


def _mark(rate: str, marks: str, phrase: str, seen: Seen) -> tuple[str, str, str]:
    try:
        return "", marked_with(marks, phrase, rate, [text for _, text in seen.texts]), ""
    except XFactorError as error:
        return said(str(error)), marks, phrase


def _like(marks: str, path: str, seen: Seen) -> tuple[str, str]:
    try:
        return "", like_text(marks, Path(path), [text for _, text in seen.texts])
    except XFactorError as error:
        return said(str(error)), marks


def _plan(bank: AdapterBank, marks: str, prompts: str, count: int, pace: float) -> str:
    """What a round would take, or what stands in its way; "" where nothing is marked or was shown yet."""
    if not (marks.strip() and pace):
        return ""
    try:
        rules = rules_of(marks, prompts_of(prompts), int(count))
    except XFactorError as error:
        return said(str(error))
    learnt, scored = (counted(len(some), "prompt") for some in (rules.prompts, rules.held_out))
    return f"A round takes {plan(bank.base, rules, pace)}. It learns after {learnt}, and is scored after {scored}."


def _teach(
    gr: Any, bank: AdapterBank, stop: threading.Event, marks: str, prompts: str, count: int, name: str, seen: Seen
) -> Iterator[tuple[Any, ...]]:
    """What the page shows from a click on: (problem, texts, seen, doing, outcome, adapter)."""
    keep = gr.skip()
    stop.clear()
    yield "", keep, keep, "starting", "", keep
    try:
        lines = prompts_of(prompts)
        rules, made = rules_of(marks, lines, int(count)), next_name(bank.root, name.strip())
        with bank.in_use:
            before = seen if seen.prompts == lines else samples(bank, lines)
            taught: Taught | None = None
            for news in teach(bank, rules, made, stop):
                if isinstance(news, Doing):
                    yield keep, keep, keep, _doing(news), keep, keep
                    time.sleep(0.2)  # the next one is the newest then, and no one reads faster
                else:
                    taught = news
            if taught is None:
                yield "", keep, keep, "stopped; nothing was written", keep, keep
                return
            after = samples(bank, lines, made)
    except XFactorError as error:
        yield said(str(error)), keep, keep, "", keep, keep
        return
    patterns, known = rules.target.patterns, gr.update(choices=[NONE, *choices(bank)[0]], value=made)
    after = replace(after, before=replace(before, before=None))
    yield "", _texts(patterns, after), after, "", _outcome(bank, taught), known


def _patterns(marks: str) -> tuple[Pattern, ...]:
    try:
        return tuple(pattern for goal in goals_of(marks) for pattern in goal.patterns)
    except XFactorError:
        return ()


def _texts(patterns: tuple[Pattern, ...], seen: Seen) -> str:
    """Texts under their prompts, beside those before where there are some; what is marked is marked in them."""
    parts, before = [], seen.before
    for number, (prompt, text) in enumerate(seen.texts):
        old = f'<div class="sample before">{marked(patterns, before.texts[number][1])}</div>' if before else ""
        new = f'<div class="sample">{marked(patterns, text)}</div>'
        kind = "pair" if before else "pair alone"
        parts.append(f'<div><b>{_text(prompt)}</b></div><div class="{kind}">{old}{new}</div>')
    heads = f"<p>of each two {_text(before.adapter or 'base')} first, then {_text(seen.adapter)}</p>" if before else ""
    return heads + "".join(parts)


def _doing(news: Doing) -> str:
    bar = f'<div class="bar"><div style="width:{100 * news.share:.0f}%"></div></div>'
    left = f", about {news.left:.0f} s left" if news.share > 0.02 else ""
    return f"{_text(news.phase)}: {news.share:.0%} of the round, {news.seconds:.0f} s so far{left}{bar}"


def _outcome(bank: AdapterBank, taught: Taught) -> str:
    """Rates before and after, what came instead, where it is, and the commands that make it again."""
    before, after = taught.before, taught.after
    wanted = [goal.wanted.describe() for goal in taught.rules.target.goals for _ in goal.patterns]
    rows = "".join(
        f"<tr><td>{_text(label)}</td><td>{wish}</td>"
        + "".join(f"<td>{s.rate([k]):.2f} ({s.counts[k]})</td>" for s in (before, after))
        + "</tr>"
        for k, (label, wish) in enumerate(zip(names(taught.rules.target.patterns), wanted, strict=True))
    )
    words = ", ".join(f"{_text(word)} ({old} → {new})" for word, old, new in taught.risen[:10])
    folder = bank.root / taught.name
    lines = "\n".join(commands(bank.base, bank.root, taught.name))
    return (
        f"<h4>{_text(taught.name)}, in {taught.seconds:.0f} s</h4>"
        '<table class="rates"><tr><th>in 1,000 words (occurrences)</th><th>wanted</th><th>before</th><th>after</th>'
        f"</tr>{rows}</table><p>Counted in {before.words:,} and {after.words:,} words after the prompts that are held "
        f"out; KL from the base {after.kl:.3f} nats a token.</p><p>Risen most: {words}</p>"
        f"<p>In {_text(str(folder))}, with {RULES}. The same again, and elsewhere:</p>"
        f'<pre class="commands">{_text(lines)}</pre>'
    )


def _text(text: str) -> str:
    return html.escape(printable(text))
