"""Options of `train` that are about words, phrases, characters and scripts, and the run that they ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from .common import Command, apply_options, load
from .console import console, say

if TYPE_CHECKING:
    from ..phrases.reference import Measured
    from ..phrases.rules import Rules
    from ..phrases.train import PhraseResult

_OWN = ("phrases", "script", "chars", "rules", "rates_from")
_ALSO = {
    "goals", "model", "revision", "offline", "dtype", "device", "load_in_8bit", "load_in_4bit", "quant_backend",
    "lora_r", "lr", "seed", "output", "force",
}  # fmt: skip
"""Options of `train` that a run for phrases heeds; every other one is refused."""


def phrase_options(function: Command) -> Command:
    """--phrases, --script, --chars, --rates-from, --prompts, --rules."""
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return apply_options(
        [
            click.option("--phrases", multiple=True, metavar="FILE[=RATE]",
                         help="Words and phrases, one a line, whatever tokens spell them. RATE is 0 (never, as without "
                         "one), x0.1 of the base's, 2.0/1000w or 2.0/1000t; repeatable."),
            click.option("--script", multiple=True, metavar="NAMES[=RATE]",
                         help="Characters of writing systems, e.g. Han,Cyrillic."),
            click.option("--chars", multiple=True, metavar="TEXT[=RATE]", help="Each of these characters."),
            click.option("--rates-from", type=path, metavar="TEXT", help="For --phrases: the rates of this text."),
            click.option("--rules", type=path,
                         help="For phrases: goals, prompts and settings from a file (YAML, or an adapter's record)."),
        ],
        function,
    )  # fmt: skip


def wants_phrases(flags: dict[str, Any]) -> bool:
    """Whether these options of `train` are about patterns over text.

    Raises:
        XFactorError: goals of tokens and of text together.
    """
    from ..phrases.goals import is_phrase_goal

    over_text = [text for text in flags["goals"] if is_phrase_goal(text)]
    if over_text and len(over_text) < len(flags["goals"]):
        raise XFactorError(
            "`goal`: goals of tokens and goals of text do not go together; train two adapters, and mix them"
        )
    return bool(over_text) or any(flags[name] for name in _OWN)


def run_phrases(ctx: click.Context, flags: dict[str, Any]) -> None:
    """The run of `train` for phrases, from its options to the adapter's folder."""
    _refuse_others(ctx)
    rules, measured = _rules(ctx, flags)
    output = flags["output"] or Path("adapters") / "phrases"
    train_and_save(flags, rules, output, measured)


def train_and_save(flags: dict[str, Any], rules: Rules, output: Path, measured: list[Measured] | None = None) -> None:
    """Load, train, save, print."""
    from ..adapters.output import prepare_output
    from ..phrases.goals import describe
    from ..phrases.saving import PAGE, save_phrases
    from ..phrases.train import train_phrases
    from .progress import TrainingProgress

    prepare_output(output, force=flags["force"])  # before anything is computed
    base = load(flags)
    goals = rules.target.goals
    console.print(f"phrases: {describe(goals[:3])}{f' and {len(goals) - 3} more' if len(goals) > 3 else ''}")
    console.print(f"prompts: {len(rules.prompts)} to learn from, {len(rules.held_out)} held out")
    with TrainingProgress(1):
        result = train_phrases(base, rules.target, rules.prompts, rules.held_out, rules.options, rules.chat)
    reference = [m.rate for m in measured] if measured else None
    save_phrases(result, output, force=flags["force"], rules=rules.record(), reference=reference)
    _print_summary(result)
    say(f"saved to {output}" + (f"; the page is {output / PAGE}" if result.after else ""))
    name = output if output.parent != Path("adapters") else output.name
    model = f" --model {flags['model']}" if flags["model"] != "auto" else ""
    say(f'next: xfactor generate --adapter {name}{model} "Write a story."')
    for kind in ("gguf", "merged"):
        say(f"      xfactor export {name} --format {kind}{model}")


def _print_summary(result: PhraseResult) -> None:
    from rich.table import Table

    if result.proof:
        say(f"{len(result.proof.banned):,} tokens are banned; no sequence of the others spells what is to come never "
            f"(all {result.proof.states} states that they reach were looked at)")  # fmt: skip
    before, after = result.before, result.after
    if before is None or after is None:
        return
    table = Table("on held-out prompts", "base", "adapter")
    low, high = after.interval
    table.add_row("occurrences in 1,000 words", f"{before.per_1000_words:.2f}",
                  f"{after.per_1000_words:.2f} ({low:.2f} to {high:.2f})")  # fmt: skip
    table.add_row("KL from the base, nats a token", "0", f"{after.kl:.4f}")
    table.add_row("distinct-2", f"{before.distinct_2:.3f}", f"{after.distinct_2:.3f}")
    console.print(table)
    console.print("risen most: " + ", ".join(f"{word} ({a} to {b})" for word, a, b in result.risen[:10]))


def _refuse_others(ctx: click.Context) -> None:
    """Raises XFactorError for options that were given and that a run for phrases does not heed."""
    for name in ctx.params:
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in _ALSO and name not in _OWN:
            flag = next(p.opts[0] for p in ctx.command.params if p.name == name)
            raise XFactorError(f"{flag} has no meaning for phrases, characters and scripts; drop it")


def _rules(ctx: click.Context, flags: dict[str, Any]) -> tuple[Rules, list[Measured] | None]:
    """What the options ask for, and the rates of the text that they are to be like."""
    from ..phrases.goals import PhraseTarget, parse_phrase_goal
    from ..phrases.reference import like
    from ..phrases.rules import Rules, read_rules

    if flags["rules"]:
        others = [name for name in (*_OWN, "goals") if name not in ("rules", "prompts") and flags[name]]
        if others or flags["prompts"]:
            raise XFactorError("`rules` says it all; drop the other options about phrases and prompts")
        rules = read_rules(flags["rules"])
        return replace(rules, options=_options(ctx, flags, rules.options)), None
    texts = [_as_goal(kind, text) for kind in ("phrases", "script", "chars") for text in flags[kind]]
    goals = tuple(parse_phrase_goal(text) for text in (*texts, *flags["goals"]))
    target, measured = PhraseTarget(goals) if goals else None, None
    if flags["rates_from"]:
        if target is None:
            raise XFactorError("`rates_from` needs `phrases`: what is to be as in the text?")
        target, measured = like(flags["rates_from"], target.patterns)
    if target is None:
        raise XFactorError("`prompts` is for phrases; give `phrases`, `chars`, `script` or `rules`, too")
    fit, held_out = prompts_of(flags)
    return Rules(target, tuple(fit), tuple(held_out), options=_options(ctx, flags)), measured


def prompts_of(flags: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(to learn from, held out): those of --prompts, or the bundled ones."""
    from ..phrases.lists import split_prompts, writing_prompts

    if not flags["prompts"]:
        return writing_prompts()
    try:
        return split_prompts(flags["prompts"].read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise XFactorError(f"`prompts` {flags['prompts']}: cannot be read as UTF-8 text: {error}") from error


def _as_goal(kind: str, text: str) -> str:
    """FILE or FILE=RATE as a goal; without a rate, never."""
    from ..phrases.goals import Wanted

    _, equals, rate = text.rpartition("=")
    try:
        Wanted.parse(rate if equals else "")
    except XFactorError:
        return f"{kind}:{text}=0"
    return f"{kind}:{text}"


def _options(ctx: click.Context, flags: dict[str, Any], start: Any = None) -> Any:
    """Settings of the run: those given over those of the rules or the defaults."""
    from ..options import PhraseOptions

    names = {"r": "lora_r", "lr": "lr", "seed": "seed"}
    given = {
        field: flags[name]
        for field, name in names.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    return replace(start or PhraseOptions(), **given)
