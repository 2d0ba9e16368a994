"""Options of `train` that are about words, phrases, characters and scripts, and the run that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from .common import Command, apply_options, load, sampling
from .config import given, write_run
from .console import MEMBER_STYLE, console, print_columns, print_json, say
from .values import from_stdin

if TYPE_CHECKING:
    from rich.text import Text

    from ..adapters.mix import Mix
    from ..bank.bank import AdapterBank
    from ..phrases.goals import PhraseGoal
    from ..phrases.reference import Measured
    from ..phrases.rules import Rules
    from ..phrases.scores import PhraseScores
    from ..phrases.train import PhraseResult
    from ..tokens.patterns import Pattern

_OWN = ("phrases", "script", "chars", "rules", "rates_from")
_ALSO = {
    "goals", "prompts", "model", "revision", "offline", "dtype", "device", "load_in_8bit", "load_in_4bit",
    "quant_backend", "lora_r", "lr", "seed", "no_eval", "output", "force", "as_json", "config",
}  # fmt: skip
"""Options of `train` that a run for phrases heeds; every other one is refused."""
_BASE = ("dtype", "device", "load_in_8bit", "load_in_4bit", "quant_backend")
"""What repeats a run besides the rules in its record."""


def phrase_options(function: Command) -> Command:
    """--phrases, --script, --chars, --rates-from, --rules."""
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return apply_options(
        [
            click.option("--phrases", multiple=True, metavar="FILE[=RATE]",
                         help="Words and phrases, one a line; - is standard input. RATE is 0 (never, the default), "
                         "x0.1 of the base's, 2.0/1000w or 2.0/1000t; repeatable."),
            click.option("--script", multiple=True, metavar="NAMES[=RATE]",
                         help="Characters of writing systems, e.g. Han,Cyrillic."),
            click.option("--chars", multiple=True, metavar="TEXT[=RATE]", help="Each of these characters."),
            click.option("--rates-from", type=path, metavar="TEXT", help="As often as in this text, each of them."),
            click.option("--rules", type=path, metavar="FILE",
                         help="Goals, prompts and settings from a file (YAML, or an adapter's xfactor.json)."),
        ],
        function,
        "Words and phrases, whatever tokens spell them",
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
    train_and_save(ctx, {**flags, "output": flags["output"] or Path("adapters") / "phrases"}, rules, measured)


def train_and_save(
    ctx: click.Context, flags: dict[str, Any], rules: Rules, measured: list[Measured] | None = None
) -> None:
    """Load, train, save, print."""
    from ..adapters.files import RECORD
    from ..adapters.output import check_free
    from ..checkpoint.locks import folder_lock
    from ..phrases.goals import describe
    from ..phrases.saving import save_phrases
    from ..phrases.train import train_phrases
    from .progress import TrainingProgress

    output, goals = flags["output"], rules.target.goals
    with folder_lock(output):  # which also shows, before anything is computed, that it can be written
        check_free(output, force=flags["force"])
        base = load(flags)
        console.print(f"phrases: {describe(goals[:3])}{f' and {len(goals) - 3} more' if len(goals) > 3 else ''}")
        console.print(f"prompts: {len(rules.prompts)} to learn from, {len(rules.held_out)} held out")
        with TrainingProgress(1):
            result = train_phrases(base, rules.target, rules.prompts, rules.held_out, rules.options, rules.chat)
        reference = [m.rate for m in measured] if measured else None
        record = save_phrases(result, output, force=flags["force"], rules=rules.record(), reference=reference)
        own = {name: flags[name] for name in _BASE} | {"rules": output / RECORD}
        write_run(ctx, own if ctx.command.name == "train" else flags, base.choice, output)
    _print_summary(result)
    _print_next(result, output, flags)
    if flags["as_json"]:
        print_json({"output": str(output), **record})


def _print_next(result: PhraseResult, output: Path, flags: dict[str, Any]) -> None:
    """Where it is, and what can be done with it."""
    from ..phrases.saving import PAGE

    console.print(f"saved to {output}" + (f"; the page is {output / PAGE}" if result.after else ""))
    name = output.name if output.parent == Path("adapters") else output
    chat = " --chat on" if getattr(result.base.tokenizer, "chat_template", None) else ""
    console.print(f'next: xfactor generate --adapter none --adapter {name}{chat} "Write a story."')
    for kind in ("gguf", "merged"):
        console.print(f"      xfactor export {name} --format {kind}")


def _print_summary(result: PhraseResult) -> None:
    if result.proof:
        say(f"{len(result.proof.banned):,} tokens are banned; no sequence of the others spells what is to come never "
            f"(all {result.proof.checked:,} others were looked at)")  # fmt: skip
    before, after = result.before, result.after
    if before is None or after is None:
        return
    console.print("on held-out prompts:")
    _print_scores({"base": before, "adapter": after})
    console.print("risen most: " + ", ".join(f"{word} ({a} to {b})" for word, a, b in result.risen[:10]))


def _print_scores(columns: dict[str, PhraseScores]) -> None:
    rows = {
        "in 1,000 words (95 % interval)": lambda s: "{:.2f} ({:.2f} to {:.2f})".format(s.per_1000_words, *s.interval),
        "KL from base, nats/token": lambda s: f"{s.kl:.4f}",
        "distinct-2": lambda s: f"{s.distinct_2:.3f}",
    }
    print_columns(list(rows), {name: [show(s) for show in rows.values()] for name, s in columns.items()})


def mark_patterns(text: Text, patterns: Sequence[Pattern]) -> int:
    """Mark every occurrence in a text that is to be printed; how many there are."""
    from ..tokens.patterns import found

    spans = [span for pattern in patterns for span in found(pattern, text.plain)]
    for start, end in spans:
        text.stylize(MEMBER_STYLE, start, end)
    return len(spans)


def phrase_adapters(bank: AdapterBank) -> list[str]:
    """Names of the loaded adapters that are for phrases.

    Raises:
        XFactorError: others are loaded too, which nothing said about tokens; the two are measured on their own.
    """
    found = [name for name, info in bank.adapters.items() if info.section("phrases")]
    if others := [name for name in bank.adapters if found and name not in found]:
        raise XFactorError(f"{found[0]} is about phrases and {others[0]} about tokens; evaluate them one by one")
    return found


def eval_phrases(
    bank: AdapterBank, mixes: list[Mix], adapters: list[str], flags: dict[str, Any], others: Sequence[str] | None
) -> None:
    """Score the base and adapters for phrases on their own texts, with all that the adapters are about.

    Prompts and chat are those of the first adapter's rules, the held-out ones, unless `others` are given.
    """
    from ..adapters.files import write_json
    from ..phrases.evaluation import Author
    from ..phrases.goals import patterns_of
    from ..phrases.rules import parse_rules
    from ..tokens.automaton import TokenAutomaton
    from ..tokens.printable import counted
    from .summary import decoding_text

    if flags["frontier"] or flags["base_model"]:
        raise XFactorError("--frontier and --base have no meaning for adapters for phrases; drop them")
    rules = parse_rules(bank.adapters[adapters[0]].record.get("rules"))
    prompts, patterns = list(others or rules.held_out or rules.prompts), patterns_of(bank.adapters.values())
    count, decoding = flags["repeats"] * len(prompts), sampling(flags)
    automaton = TokenAutomaton(bank.base.tokenizer, patterns, bank.base.vocab_size)
    author, columns = Author(bank.base, automaton, rules.chat), {}
    for mix in mixes:
        bank.use(mix, flags["scale"])
        name, off = (str(mix), bank.base_only) if mix.parts else (bank.base.choice.name, None)
        columns[name], _ = author.scored(prompts, count, decoding, off)
    console.print(counted(len(patterns), "pattern"))
    _print_scores(columns)
    settings = {**decoding.record(), "prompts": len(prompts), "repeats": flags["repeats"]}
    console.print(decoding_text(settings), style="dim")
    if path := flags["json_file"]:
        record = {
            "base": bank.base.record(),
            "decoding": settings,
            "scores": {name: s.record() for name, s in columns.items()},
        }
        print_json(record) if path == "-" else write_json(Path(path), record)


def _refuse_others(ctx: click.Context) -> None:
    """Raises XFactorError for options that were given and that a run for phrases does not heed."""
    for param in ctx.command.params:
        if param.name not in _ALSO and param.name not in _OWN and given(ctx, str(param.name)):
            raise XFactorError(f"{param.opts[0]} has no meaning for phrases, characters and scripts; drop it")


def _rules(ctx: click.Context, flags: dict[str, Any]) -> tuple[Rules, list[Measured] | None]:
    """What the options ask for, and the rates of the text that they are to be like."""
    from ..phrases.goals import PhraseTarget
    from ..phrases.reference import like
    from ..phrases.rules import Rules, read_rules

    if flags["rules"]:
        if any(flags[name] for name in (*_OWN, "goals", "prompts") if name != "rules"):
            raise XFactorError("`rules` says it all; drop the other options about phrases and prompts")
        rules = read_rules(flags["rules"])
        return replace(rules, options=_options(ctx, flags, rules.options)), None
    texts = [_as_goal(kind, text) for kind in ("phrases", "script", "chars") for text in flags[kind]]
    goals = tuple(_read_goal(text) for text in (*texts, *flags["goals"]))
    asked = [text for kind in ("phrases", "script", "chars") for text in flags[kind]] + list(flags["goals"])
    target, measured = PhraseTarget(goals) if goals else None, None
    if flags["rates_from"]:
        if target is None:
            raise XFactorError("`rates_from` needs `phrases`: what is to be as in the text?")
        if rated := [text for text in asked if _has_rate(text)]:
            raise XFactorError(f"`rates_from` sets every rate; drop the one of {rated[0]!r}, or train two adapters")
        target, measured = like(flags["rates_from"], target.patterns)
    assert target is not None  # or `wants_phrases` had said no
    fit, held_out = prompts_of(flags)
    return Rules(target, tuple(fit), tuple(held_out), options=_options(ctx, flags)), measured


def prompts_of(flags: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(to learn from, held out): those of --prompts, or the bundled ones."""
    from ..phrases.lists import split_prompts, writing_prompts
    from ..sampling.prompt_families import read_families

    if not flags["prompts"]:
        return writing_prompts()
    return split_prompts([prompt for family in read_families(Path(flags["prompts"])) for prompt in family.prompts])


def _as_goal(kind: str, text: str) -> str:
    """FILE or FILE=RATE as a goal; without a rate, never.

    Raises:
        XFactorError: what follows the last = has a digit, so that it is meant as a rate, and is none.
    """
    if _has_rate(text):
        return f"{kind}:{text}"
    _, equals, rate = text.rpartition("=")
    if equals and any(map(str.isdigit, rate)) and not (kind == "phrases" and Path(text).is_file()):
        from ..phrases.goals import Wanted

        Wanted.parse(rate)
    return f"{kind}:{text}=0"


def _has_rate(text: str) -> bool:
    """Whether it ends with =RATE."""
    from ..phrases.goals import Wanted

    _, equals, rate = text.rpartition("=")
    try:
        Wanted.parse(rate if equals else "")
    except XFactorError:
        return False
    return True


def _read_goal(text: str) -> PhraseGoal:
    """As `parse_phrase_goal`; a file of phrases called - is standard input."""
    from ..phrases.goals import PhraseGoal, Wanted, parse_phrase_goal
    from ..tokens.patterns import phrases

    if not text.startswith("phrases:-="):
        return parse_phrase_goal(text)
    return PhraseGoal("phrases", phrases(from_stdin().splitlines()), Wanted.parse(text.rpartition("=")[2]))


def _options(ctx: click.Context, flags: dict[str, Any], start: Any = None) -> Any:
    """Settings of the run: those given over those of the rules or the defaults."""
    from ..options import PhraseOptions

    names = {"r": "lora_r", "lr": "lr", "seed": "seed"}
    chosen = {field: flags[name] for field, name in names.items() if given(ctx, name)}
    if flags["no_eval"]:
        chosen["eval_texts"] = 0
    return replace(start or PhraseOptions(), **chosen)
