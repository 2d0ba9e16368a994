"""`xfactor play`: generate interactively, swap adapters in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from ..adapters.mix import Mix, parse_mix
from ..errors import XFactorError
from ..options import ChatOptions, parse_rate
from ..tokens.printable import printable
from .common import (
    adapter_model_options,
    adapters_dir_option,
    chat_options,
    load_to_generate,
    own_base,
    sampling,
    sampling_options,
)
from .config import config_option
from .flags import as_flags
from .help import Command, did_you_mean
from .values import ADAPTER

if TYPE_CHECKING:
    from ..bank.bank import AdapterBank
    from ..options import SamplingOptions
    from ..tokens.token_set import TokenSet

HELP = """\
/adapter NAME   load (once) and switch to an adapter, or to a mix: x:0.7+z:0.3
/base           switch adapters off
/scale NUMBER   strength of the active adapter; 0 is the base, 1 as trained
/rate 5%        the scale whose measured rate is this, for an adapter with a dial
/list           adapters, the active one marked
/length NUMBER, /temperature NUMBER, /seed NUMBER
/new            begin a new conversation; only chat models have one
/help, /quit
Anything else is a prompt. Ctrl-C stops an answer, Ctrl-D ends the program."""
COMMANDS = ("adapter", "base", "scale", "rate", "list", "length", "temperature", "seed", "new", "help", "quit")


@click.command(
    "play",
    cls=Command,
    first=("adapter", "max_new_tokens", "temperature", "seed", "chat"),
    examples=["xfactor play --adapter demo-rate", "xfactor play --model demo --max-new-tokens 100"],
)
@config_option
@click.option("--adapter", type=ADAPTER, metavar="NAME", help="Start with this adapter.")
@adapters_dir_option
@adapter_model_options
@sampling_options
@chat_options
def command(**flags: Any) -> None:
    """Generate interactively and swap adapters in place; the base is loaded once."""
    from ..bank.bank import AdapterBank
    from .console import console

    options = sampling(flags)
    names = [flags["adapter"]] if flags["adapter"] else []
    base, chat = load_to_generate(own_base(flags, names, flags["adapters_dir"]))
    session = Session(AdapterBank(base, flags["adapters_dir"]), options, chat)
    if flags["adapter"]:
        console.print(session.answer(f"/adapter {flags['adapter']}"))
    console.print("A prompt, or /help.", style="dim")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    _edit_lines(session)
    while not session.over:
        try:
            line = _line(f"{session.name}> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /quit ends the program.", style="dim")
            continue
        try:
            if line.startswith("/"):
                console.print(session.answer(line))
            elif line.strip():
                _show(session, line)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim")
        except XFactorError as error:
            console.print(f"Error: {as_flags(str(error))}", style="red")


def _show(session: Session, prompt: str) -> None:
    """Print an answer as its tokens come; what may still become another character is held back."""
    from ..tokens.highlight import UNFINISHED
    from .console import console, highlighted

    ids: list[int] = []
    shown, sets, tokenizer = 0, session.sets(), session.bank.base.tokenizer
    for ids in session.stream(prompt):
        text = highlighted(tokenizer, ids, sets)
        if ids and not text.plain.endswith(UNFINISHED):
            console.print(text[shown:], end="", soft_wrap=True)
            shown = len(text)
    console.print(highlighted(tokenizer, ids, sets)[shown:], soft_wrap=True)
    for tokens in sets if ids else ():
        console.print(f"R {tokens.share(ids):.3f} of {len(ids)} tokens, {tokens.describe()}", style="dim")


def _edit_lines(session: Session) -> None:
    """History and completion of what is typed, where Python has readline and a person types; kept in memory only."""
    if sys.stdin is None or not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:  # Windows
        return

    def complete(_: str, state: int) -> str | None:
        found = session.completions(readline.get_line_buffer())
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" +")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def _line(prompt: str) -> str:
    """A line of standard input, or EOFError where it is over, or was closed before the start."""
    if sys.stdin is None or sys.stdin.closed:
        raise EOFError
    return input(printable(prompt))


@dataclass
class Session:
    """One conversation: a bank of adapters, sampling options, and what a line of input does to them."""

    bank: AdapterBank
    options: SamplingOptions
    chat: ChatOptions = field(default_factory=ChatOptions)
    chosen: Mix = field(default_factory=Mix)
    over: bool = False

    @property
    def name(self) -> str:
        """What is active, for the prompt."""
        mix = self.bank.active
        return f"{mix.names[0]} x {mix.parts[0][1]:.4g}" if len(mix.parts) == 1 else str(mix)

    def answer(self, line: str) -> str:
        """Carry out a command; raises XFactorError and changes nothing on bad input."""
        command, _, argument = line[1:].strip().partition(" ")
        actions = {
            "adapter": self._adapter,
            "base": lambda _: self._adapter("none"),
            "scale": lambda text: self._use(self.chosen, _number(text, "/scale")),
            "list": lambda _: self._list(),
            "rate": self._rate,
            "length": lambda text: self._set("max_new_tokens", _whole(text, "/length")),
            "temperature": lambda text: self._set("temperature", _number(text, "/temperature")),
            "seed": lambda text: self._set("seed", _whole(text, "/seed")),
            "new": lambda _: self._new(),
            "help": lambda _: HELP,
            "quit": lambda _: self._quit(),
        }
        if command not in actions:
            meant = did_you_mean(f"/{command}", [f"/{name}" for name in COMMANDS])
            return f"unknown command /{command}.{meant}\n{HELP}"
        return actions[command](argument.strip())

    def _adapter(self, name: str) -> str:
        mix = parse_mix(name, self._known())
        for part in mix.names:
            self.bank.load(part)
        return self._use(mix, 1.0)

    def _use(self, mix: Mix, scale: float) -> str:
        self.bank.use(mix, scale)
        self.chosen = mix
        return f"now: {self.name}"

    def _rate(self, text: str) -> str:
        if len(self.chosen.parts) != 1:
            raise XFactorError("/rate picks the scale of one adapter; choose one with /adapter first")
        name = self.chosen.names[0]
        return self._use(Mix.of(name), self.bank.scale_for_rate(name, parse_rate(text)))

    def _set(self, name: str, value: float) -> str:
        changes: dict[str, Any] = {name: value}
        self.options = replace(self.options, **changes)
        return f"{name.replace('_', ' ')} {value if isinstance(value, int) else format(value, 'g')}"

    def completions(self, line: str) -> list[str]:
        """What the last word of `line` may become: a command, or after /adapter a name."""
        word = line.replace("+", " ").split(" ")[-1]
        if line.startswith("/adapter "):
            return [name for name in self._known() if name.startswith(word)]
        return [f"/{name} " for name in COMMANDS if line.startswith("/") and f"/{name}".startswith(line)]

    def _list(self) -> str:
        names = dict.fromkeys([*self._known(), *self.bank.adapters])
        rows = [f"{'*' if name in self.bank.active.names else ' '} {name}" for name in names]
        return "\n".join(rows) or f"no adapter in {self.bank.root}/"

    def _known(self) -> list[str]:
        from ..adapters.adapter import list_adapters

        return list_adapters(self.bank.root)

    def _quit(self) -> str:
        self.over = True
        return "bye"

    def sets(self) -> list[TokenSet]:
        """The token sets of what is active."""
        return [tokens for name in self.bank.active.names if (tokens := self.bank.token_set(name))]

    def _new(self) -> str:
        self.chat = replace(self.chat, earlier=())
        return "a new conversation"

    def stream(self, prompt: str) -> Iterator[list[int]]:
        """The ids that continue or answer `prompt`, growing.

        A chat model sees the turns before, the oldest left out where its context is full. A turn counts once it began.
        """
        from ..sampling.chat import chat_used, question
        from ..sampling.contexts import tokens_left
        from ..sampling.generation import stream

        base, ids = self.bank.base, []
        if not chat_used(base.tokenizer, self.chat):
            yield from stream(self.bank.model, base.tokenizer, prompt, self.options, piece=1, chat=self.chat)
            return
        room = tokens_left(base, self.options.max_new_tokens)
        chat = self.chat
        while chat.earlier and len(question(base.tokenizer, prompt, chat)) > room:
            chat = replace(chat, earlier=chat.earlier[2:])
        try:
            for ids in stream(self.bank.model, base.tokenizer, prompt, self.options, piece=1, chat=chat):
                yield ids
        finally:
            if ids:
                answer = str(base.tokenizer.decode(ids, skip_special_tokens=True))
                self.chat = replace(chat, earlier=(*chat.earlier, prompt, answer))


def _number(text: str, command: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise XFactorError(f"{command} needs a number; got {text!r}") from error


def _whole(text: str, command: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise XFactorError(f"{command} needs a whole number; got {text!r}") from error
