"""A round of teaching, without a browser: texts to mark, what it takes, training that can be stopped, and commands."""

from __future__ import annotations

import math
import queue
import re
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import yaml

from ..bank.bank import AdapterBank
from ..base.loading import Base
from ..base.split_model import SplitModel
from ..budget.memory_model import runtime
from ..checkpoint.durable import write_atomically
from ..errors import XFactorError
from ..lowmem.kv_cache import token_bytes
from ..lowmem.memory import mib
from ..objective.kl import LOGITS_BYTES
from ..options import ChatOptions, SamplingOptions
from ..phrases.evaluation import Author
from ..phrases.rules import Rules
from ..phrases.saving import save_phrases
from ..phrases.scores import PhraseScores
from ..phrases.train import train_phrases
from ..phrases.trunk import SHARE
from ..phrases.trunk import TEXTS as STEP_TEXTS
from ..progress import listening
from ..sampling.generation import generate_batch
from ..sampling.sampler import cache_limit, tokens_at_once
from ..tokens.automaton import TokenAutomaton
from ..tokens.patterns import phrases
from .marks import ROUND, rules_of

RULES = "rules.yaml"
TRIED = 8
"""Tokens of each text that the time of a round is guessed from."""
SLOWER = 1.5
"""What a token of a whole round took over one of these few: 1.3, 1.4, 1.5 and 1.8 times as long in four rounds."""
WAIT, FEWEST, STEP = 250, 16, 8
"""Seconds that a round is planned for unless more is asked for: five minutes, less what a plan may be off and the texts
that are shown side by side afterwards; the texts that it has in any case, and by how many others come."""
_NAME = re.compile(r"\w[\w.-]*")


def pace_of(base: Base, prompts: Sequence[str]) -> float:
    """Seconds that a token of a round's texts takes to draw, many texts at once, its share of the prompt's with it.

    From two tries that are short: their difference is without the prompt, which a text reads once.
    """
    author = Author(base, TokenAutomaton(base.tokenizer, phrases(["the"]), base.vocab_size), cache=ROUND.cache)
    times = [time.perf_counter()]
    for tokens in (1, 1 + TRIED):
        author.write(prompts[:1], ROUND.eval_texts, SamplingOptions(tokens))
        times.append(time.perf_counter())
    begin, longer = times[1] - times[0], times[2] - times[1]
    return SLOWER * (max(longer - begin, 0.0) / TRIED + begin / ROUND.length) / ROUND.eval_texts


def works(rules: Rules) -> dict[str, float]:
    """The phases of a round, by their names, each with what it takes: in tokens drawn.

    Measured on two models: to learn from a token takes about twice as long as to draw one; a student's text is read
    by the base once more, and a text of the adapter's that is scored by both.
    """
    o = rules.options
    learnt = {
        "drawing texts of the base": 1.0 * o.texts,
        "drawing texts that hold more of the patterns": 0.6 * o.texts,
        "learning, round 1": 1.3 * o.texts,
        "drawing texts of the student, round 1": 0.85 * o.texts,
        "learning, round 2": 1.6 * o.texts,
    }
    hard = all(goal.hard for goal in rules.target.goals)
    texts = {"measuring the base": 1.0 * o.eval_texts} | ({} if hard else learnt)
    return {name: o.length * count for name, count in (texts | {"measuring the adapter": 2.2 * o.eval_texts}).items()}


def texts_in_time(prompts: Sequence[str], pace: float) -> int:
    """Texts to learn from, so that a round takes `WAIT` seconds at most: those of `ROUND`, or fewer."""
    one = pace * sum(works(rules_of("the = x0.5", list(prompts), FEWEST)).values()) / FEWEST
    return max(FEWEST, min(ROUND.texts, int(WAIT / one) // STEP * STEP))


def plan(base: Base, rules: Rules, pace: float) -> str:
    """Time and memory of a round, in words; `pace` is that of `pace_of`.

    Memory is what the process holds now, and beside it the key-value cache of the texts that are drawn at once, the
    logits of a piece, what a step saves in the last blocks and kernels: by a quarter more than these add up to.
    """
    author = Author(base, TokenAutomaton(base.tokenizer, (), base.vocab_size), rules.chat)
    lengths = [len(ids) for ids in author.encoded(rules.prompts, rules.options.length)]
    rest = max(lengths) - min(lengths)  # a longer prompt is read token by token, beside the texts of shorter ones
    seconds = pace * sum(works(rules).values()) * (1 + rest / rules.options.length)
    about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{5 * math.ceil(seconds / 5)} seconds"
    return f"about {about}, {mib(psutil.Process().memory_info().rss + _extra(base, rules, max(lengths)))} at most"


def _extra(base: Base, rules: Rules, prompt: int) -> float:
    config, policy = base.model.config.get_text_config(), SplitModel(base.model)
    size = 1.5 * base.model.dtype.itemsize
    width = config.hidden_size
    length = rules.options.length + prompt
    with cache_limit(lambda: rules.options.cache * 2**20, rules.options.cache * 2**20):
        drawn = min(length * max(rules.options.texts, rules.options.eval_texts), tokens_at_once(policy))
    cache = drawn * token_bytes(config, base.model.dtype)
    wide = 6 * (getattr(config, "intermediate_size", None) or 4 * width) + 10 * width
    step = size * STEP_TEXTS * length * wide * math.ceil(config.num_hidden_layers / SHARE)
    return 1.25 * (cache + step + 5 * LOGITS_BYTES + runtime(4))


@dataclass(frozen=True)
class Doing:
    """Where a round is: its phase, the share of the whole that is done (0 to 1), seconds since the start."""

    phase: str
    share: float
    seconds: float

    @property
    def left(self) -> float:
        """Seconds to come, if the rest is as fast."""
        return self.seconds * (1 - self.share) / self.share if self.share else math.inf


@dataclass(frozen=True)
class Taught:
    """What a round made."""

    name: str
    rules: Rules
    before: PhraseScores
    after: PhraseScores
    risen: list[tuple[str, int, int]]
    seconds: float


class _Stopped(Exception):
    pass


def teach(bank: AdapterBank, rules: Rules, name: str, stop: threading.Event) -> Iterator[Doing | Taught]:
    """Train and save the adapter `name` in a thread of its own, and yield signs of life; `Taught` comes last.

    The base trains where it lies, so a round needs no second copy of the model; the bank is empty afterwards.
    When `stop` is set, or the iterator is closed, training ends at its next sign of life, nothing is written, and
    nothing more comes.

    Raises:
        XFactorError: what `train_phrases` and `save_phrases` refuse; memory ran out.
    """
    news: queue.Queue[Any] = queue.Queue()
    started = time.perf_counter()

    parts, reached = works(rules), 0.0
    whole = sum(parts.values())

    def hear(phase: str, done: float, total: int) -> None:
        nonlocal reached
        if stop.is_set():
            raise _Stopped
        before = sum(list(parts.values())[: list(parts).index(phase)]) if phase in parts else 0.0
        now = parts.get(phase, 0.0) * (done / total if total else 0.0)
        reached = max(reached, (before + now) / whole)  # some phases count twice
        news.put(Doing(phase, reached, time.perf_counter() - started))

    def work() -> None:
        try:
            with bank.lent() as base, listening(hear):
                news.put(_taught(base, rules, bank.root / name))
        except BaseException as error:
            news.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            what = news.get()
            while isinstance(what, Doing) and not news.empty():
                what = news.get()
            if isinstance(what, _Stopped):
                return
            if isinstance(what, MemoryError):
                raise XFactorError("memory ran out; take fewer texts, or load the model quantised") from what
            if isinstance(what, BaseException):
                raise what
            yield what
            if isinstance(what, Taught):
                return
    finally:
        stop.set()
        thread.join()


def _taught(base: Base, rules: Rules, folder: Path) -> Taught:
    result = train_phrases(base, rules.target, rules.prompts, rules.held_out, rules.options, rules.chat)
    save_phrases(result, folder, rules=rules.record())
    text = yaml.safe_dump(rules.record(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / RULES, text.encode())
    assert result.before is not None  # there is a held-out prompt, and a text for it
    assert result.after is not None
    return Taught(folder.name, rules, result.before, result.after, result.risen, result.seconds)


@dataclass(frozen=True)
class Seen:
    """Texts to mark: (prompt, text) each, the adapter that wrote them, "" for the base, and what it is to be beside."""

    texts: tuple[tuple[str, str], ...] = ()
    adapter: str = ""
    before: Seen | None = None

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.texts]


def samples(bank: AdapterBank, prompts: list[str], adapter: str = "") -> Seen:
    """What the base, or an adapter, writes after each prompt, in one batch and always with the same random numbers.

    Raises:
        XFactorError: a prompt is too long, or the adapter does not fit.
    """
    if adapter:
        bank.load(adapter)
    bank.use(adapter or None)
    options = SamplingOptions(ROUND.length)
    ids = generate_batch(bank.model, bank.base.tokenizer, prompts, options, ChatOptions("auto"))
    texts = (cast(str, bank.base.tokenizer.decode(row)) for row in ids)
    return Seen(tuple(zip(prompts, texts, strict=True)), adapter)


def next_name(root: Path, name: str) -> str:
    """NAME-1, NAME-2 …: the first that no adapter has.

    Raises:
        XFactorError: not the name of a folder.
    """
    if not _NAME.fullmatch(name):
        raise XFactorError(f"{name!r} cannot name an adapter; use letters, digits, dots and dashes")
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


def commands(base: Base, root: Path, name: str) -> list[str]:
    """What makes the adapter again, shows it and takes it elsewhere, to be typed into a terminal."""
    choice, quantised = base.choice, {"int8": " --load-in-8bit", "nf4": " --load-in-4bit"}
    model = f"--model {shlex.quote(choice.name)}" + (f" --revision {choice.revision}" if choice.revision else "")
    loaded = f" --dtype {base.dtype} --device {base.device}" + quantised.get(base.quantization or "", "")
    folder, chat = shlex.quote(str(root / name)), " --chat on" * bool(getattr(base.tokenizer, "chat_template", None))
    return [
        f"xfactor train {model}{loaded} --rules {folder}/{RULES} --output {folder}-again",
        f'xfactor generate {model} --adapter none --adapter {folder}{chat} "Write a story."',
        f"xfactor eval {model} --adapter {folder}",
        f"xfactor export {folder} --format gguf",
    ]
