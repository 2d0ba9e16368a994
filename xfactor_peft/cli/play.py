"""`xfactor play`: generate interactively, swap adapters in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import load, model_options, sampling, sampling_options

if TYPE_CHECKING:
    from rich.text import Text

    from ..bank import AdapterBank
    from ..generation import SamplingOptions

HELP = """\
/adapter NAME   load (once) and switch to an adapter
/base           switch adapters off
/scale NUMBER   strength of the active adapter; 0 is the base, 1 as trained
/list           adapters, the active one marked
/seed NUMBER    seed of the next samples
/help, /quit
Anything else is a prompt."""


@click.command("play")
@click.option("--adapter", metavar="NAME", help="Start with this adapter.")
@click.option("--adapters-dir", type=click.Path(path_type=Path), default="adapters", show_default=True)
@model_options
@sampling_options
def command(**flags: Any) -> None:
    """Generate interactively and swap adapters in place; the base is loaded once."""
    from ..bank import AdapterBank
    from ..errors import XFactorError
    from .console import console

    options = sampling(flags)
    session = Session(AdapterBank(load(flags), flags["adapters_dir"]), options)
    if flags["adapter"]:
        console.print(session.answer(f"/adapter {flags['adapter']}"), markup=False)
    console.print("A prompt, or /help.", style="dim")
    while not session.over:
        try:
            line = input(f"{session.name}> ")
        except (EOFError, KeyboardInterrupt):
            break
        try:
            console.print(session.answer(line), markup=False)
        except XFactorError as error:
            console.print(f"Error: {error}", style="red", markup=False)


@dataclass
class Session:
    """One conversation: a bank of adapters, sampling options, and what a line of input does to them."""

    bank: AdapterBank
    options: SamplingOptions
    over: bool = False

    @property
    def name(self) -> str:
        """What is active, for the prompt."""
        return "base" if self.bank.active is None else f"{self.bank.active} x {self.bank.scale:g}"

    def answer(self, line: str) -> Text | str:
        """Carry out a command or continue a prompt; raises XFactorError and changes nothing on bad input."""
        if not line.startswith("/"):
            return self._generate(line)
        command, _, argument = line[1:].strip().partition(" ")
        actions = {
            "adapter": self._adapter,
            "base": lambda _: self._use(None, 1.0),
            "scale": lambda text: self._use(self.bank.active, _number(text, "/scale")),
            "list": lambda _: self._list(),
            "seed": self._seed,
            "help": lambda _: HELP,
            "quit": lambda _: self._quit(),
        }
        if command not in actions:
            return f"unknown command /{command}\n{HELP}"
        return actions[command](argument.strip())

    def _adapter(self, name: str) -> str:
        self.bank.load(name)
        return self._use(name, 1.0)

    def _use(self, name: str | None, scale: float) -> str:
        self.bank.use(name, scale)
        return f"now: {self.name}"

    def _seed(self, text: str) -> str:
        from dataclasses import replace

        self.options = replace(self.options, seed=int(_number(text, "/seed")))
        return f"seed {self.options.seed}"

    def _list(self) -> str:
        from ..adapters import list_adapters

        names = dict.fromkeys([*list_adapters(self.bank.root), *self.bank.adapters])
        rows = [f"{'*' if name == self.bank.active else ' '} {name}" for name in names]
        return "\n".join(rows) or f"no adapter in {self.bank.root}/"

    def _quit(self) -> str:
        self.over = True
        return "bye"

    def _generate(self, prompt: str) -> Text:
        import torch

        from ..metrics import rate_per_sequence
        from .console import highlighted

        tokens = self.bank.token_set(self.bank.active) if self.bank.active else None
        ids = self.bank.generate(prompt, self.options)
        text = highlighted(self.bank.base.tokenizer, ids, tokens)
        if tokens and ids:
            rate = float(rate_per_sequence(torch.tensor([ids]), tokens.mask())[0])
            text.append(f"\nR {rate:.3f} of {len(ids)} tokens", style="dim")
        return text


def _number(text: str, command: str) -> float:
    from ..errors import XFactorError

    try:
        return float(text)
    except ValueError as error:
        raise XFactorError(f"{command} needs a number; got {text!r}") from error
