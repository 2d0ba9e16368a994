"""The page before and after: rates as bars, what came instead, samples side by side with their matches marked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..tokens.patterns import Pattern, found, names
from ..tokens.printable import printable
from .scores import PhraseScores
from .train import PhraseResult

ROWS, SAMPLES = 40, 12
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .15rem .6rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999; font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap }
.bar { height: .55rem; margin: .12rem 0; border-radius: 2px; min-width: 1px }
.before { background: #c0504d } .after { background: #2e7d6b } .people { background: #8a8a8a }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: .6rem 0 1.4rem }
.text { white-space: pre-wrap; border: 1px solid #ddd; border-radius: 4px; padding: .6rem .8rem }
mark { background: #ffd54d; padding: 0 .1em } .key span { display: inline-block; width: .8rem; height: .8rem;
  margin: 0 .3rem 0 1rem; vertical-align: -.1rem }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr } }
"""


def write_page(path: Path, result: PhraseResult, name: str, reference: Sequence[float] | None = None) -> None:
    """One file without scripts and without anything from elsewhere; text that models wrote is escaped.

    Args:
        reference: rates per 1,000 words of every pattern in a text of people's.
    """
    before, after = _scores(result)
    low, high = after.interval
    where = _text(result.base.choice.name)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title>",
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{_text(name)}: before and after</h1>",
        f"<p>{len(result.target.patterns)} patterns on {where}, on prompts that training never "
        f"saw: <b>{before.per_1000_words:.2f}</b> occurrences in 1,000 words before, <b>{after.per_1000_words:.2f}</b> "
        f"after (95 % interval {low:.2f} to {high:.2f}); {before.words:,} and {after.words:,} words.</p>",
        "<table><tr><th></th><th class='n'>before</th><th class='n'>after</th></tr>",
        _row("KL from the base, nats a token", f"{before.kl:.4f}", f"{after.kl:.4f}"),
        _row("distinct-2", f"{before.distinct_2:.3f}", f"{after.distinct_2:.3f}"),
        "</table>",
        *_bars(result, reference),
        "<h2>What came instead</h2><p>The words that rose most, with how often they were said before and after.</p><p>",
        ", ".join(f"{_text(word)} ({first} → {second})" for word, first, second in result.risen),
        "</p><h2>Samples</h2>",
        *(_sample(result.target.patterns, *sample) for sample in result.samples[:SAMPLES]),
        "</html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _scores(result: PhraseResult) -> tuple[PhraseScores, PhraseScores]:
    if result.before is None or result.after is None:
        raise ValueError("there are no scores to show")
    return result.before, result.after


def _bars(result: PhraseResult, reference: Sequence[float] | None) -> list[str]:
    before, after = _scores(result)
    columns = [("before", [before.rate([k]) for k in range(len(before.counts))])]
    columns.append(("after", [after.rate([k]) for k in range(len(after.counts))]))
    if reference is not None:
        columns.append(("people", list(reference)))
    every = range(len(before.counts))
    shown = [
        k for k in sorted(every, key=lambda k: -max(c[k] for _, c in columns))[:ROWS] if any(c[k] for _, c in columns)
    ]
    most = max((c[k] for k in shown for _, c in columns), default=1.0) or 1.0
    labels = names(result.target.patterns)
    key = "".join(f"<span class='{kind}'></span>{kind}" for kind, _ in columns)
    lines = [f"<h2>Occurrences in 1,000 words</h2><p class='key'>{key}</p><table>"]
    for k in shown:
        bars = "".join(f"<div class='bar {kind}' style='width:{100 * c[k] / most:.1f}%'></div>" for kind, c in columns)
        numbers = " / ".join(f"{c[k]:.2f}" for _, c in columns)
        lines.append(
            f"<tr><td>{_text(labels[k])}</td><td style='width:65%'>{bars}</td><td class='n'>{numbers}</td></tr>"
        )
    return [*lines, "</table>"]


def marked(patterns: Sequence[Pattern], text: str) -> str:
    """HTML of a text with every occurrence in <mark>; overlapping ones share a mark."""
    spans = sorted(span for pattern in patterns for span in found(pattern, text))
    out, at = [], 0
    for start, end in spans:
        if end > at:
            out += [_text(text[at : max(at, start)]), f"<mark>{_text(text[max(at, start) : end])}</mark>"]
            at = end
    return "".join([*out, _text(text[at:])])


def _sample(patterns: Sequence[Pattern], prompt: str, before: str, after: str) -> str:
    texts = "".join(f"<div class='text'>{marked(patterns, text)}</div>" for text in (before, after))
    return f"<p><b>{_text(prompt)}</b></p><div class='pair'>{texts}</div>"


def _row(label: str, *values: str) -> str:
    return f"<tr><td>{_text(label)}</td>{''.join(f'<td class=n>{value}</td>' for value in values)}</tr>"


def _text(text: str) -> str:
    return escape(printable(text))
