"""`xfactor play`: generate interactively, swap adapters in place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from ..adapters.adapter import list_adapters
from ..adapters.mix import Mix, parse_mix
from ..errors import XFactorError
from ..options import ChatOptions
from ..tokens.printable import printable
from .common import adapters_dir_option, chat_options, load_to_generate, model_options, sampling, sampling_options
from .flags import as_flags

if TYPE_CHECKING:
    from rich.text import Text

    from ..bank.bank import AdapterBank
    from ..options import SamplingOptions

HELP = """\
/adapter NAME   load (once) and switch to an adapter, or to a mix: x:0.7+z:0.3
/base           switch adapters off
/scale NUMBER   strength of the active adapter; 0 is the base, 1 as trained
/list           adapters, the active one marked
/seed NUMBER    seed of the next samples
/help, /quit
Anything else is a prompt, each a conversation of its own."""


@click.command("play")
@click.option("--adapter", metavar="NAME", help="Start with this adapter.")
@adapters_dir_option
@model_options
@sampling_options
@chat_options
def command(**flags: Any) -> None:
    """Generate interactively and swap adapters in place; the base is loaded once."""
    from ..bank.bank import AdapterBank
    from .console import console

    options = sampling(flags)
    base, chat = load_to_generate(flags)
    session = Session(AdapterBank(base, flags["adapters_dir"]), options, chat)
    if flags["adapter"]:
        console.print(session.answer(f"/adapter {flags['adapter']}"))
    console.print("A prompt, or /help.", style="dim")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while not session.over:
        try:
            line = _line(f"{session.name}> ")
        except (EOFError, KeyboardInterrupt):
            break
        try:
            console.print(session.answer(line))
        except XFactorError as error:
            console.print(f"Error: {as_flags(str(error))}", style="red")


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
        return f"{mix.names[0]} x {mix.parts[0][1]:g}" if len(mix.parts) == 1 else str(mix)

    def answer(self, line: str) -> Text | str:
        """Carry out a command or continue a prompt; raises XFactorError and changes nothing on bad input."""
        if not line.startswith("/"):
            return self._generate(line)
        command, _, argument = line[1:].strip().partition(" ")
        actions = {
            "adapter": self._adapter,
            "base": lambda _: self._adapter("none"),
            "scale": lambda text: self._use(self.chosen, _number(text, "/scale")),
            "list": lambda _: self._list(),
            "seed": self._seed,
            "help": lambda _: HELP,
            "quit": lambda _: self._quit(),
        }
        if command not in actions:
            return f"unknown command /{command}\n{HELP}"
        return actions[command](argument.strip())

    def _adapter(self, name: str) -> str:
        mix = parse_mix(name, list_adapters(self.bank.root))
        for part in mix.names:
            self.bank.load(part)
        return self._use(mix, 1.0)

    def _use(self, mix: Mix, scale: float) -> str:
        self.bank.use(mix, scale)
        self.chosen = mix
        return f"now: {self.name}"

    def _seed(self, text: str) -> str:
        self.options = replace(self.options, seed=int(_number(text, "/seed")))
        return f"seed {self.options.seed}"

    def _list(self) -> str:
        names = dict.fromkeys([*list_adapters(self.bank.root), *self.bank.adapters])
        rows = [f"{'*' if name in self.bank.active.names else ' '} {name}" for name in names]
        return "\n".join(rows) or f"no adapter in {self.bank.root}/"

    def _quit(self) -> str:
        self.over = True
        return "bye"

    def _generate(self, prompt: str) -> Text:
        from .console import highlighted

        sets = [tokens for name in self.bank.active.names if (tokens := self.bank.token_set(name))]
        ids = self.bank.generate(prompt, self.options, self.chat)
        text = highlighted(self.bank.base.tokenizer, ids, sets)
        for tokens in sets if ids else ():
            text.append(f"\nR {tokens.share(ids):.3f} of {len(ids)} tokens, {tokens.describe()}", style="dim")
        return text


def _number(text: str, command: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise XFactorError(f"{command} needs a number; got {text!r}") from error
