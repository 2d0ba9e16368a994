"""`xfactor unslop`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import model_options
from .console import say
from .phrases import prompts_of, train_and_save


@click.command("unslop")
@model_options
@click.option("--list", "show", is_flag=True, help="Print the list of words and phrases, and do nothing else.")
@click.option("--add", multiple=True, metavar="PHRASE", help="Also this one; repeatable.")
@click.option("--keep", multiple=True, metavar="PHRASE", help="Not this one; repeatable.")
@click.option("--rate", default="0", show_default=True, metavar="RATE",
              help="0 is never; x0.1 a tenth of the base's; 2.0/1000w in 1,000 words.")  # fmt: skip
@click.option(
    "--rates-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="TEXT",
    help="In place of --rate: each as often as in this text.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One a line, every second held out.  [default: 64 for writing]",
)
@click.option("--texts", default=256, show_default=True, help="Texts of the base to learn from.")
@click.option("--length", default=112, show_default=True, help="Tokens of each.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="adapters/unslop", show_default=True
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.pass_context
def command(ctx: click.Context, show: bool, **flags: Any) -> None:
    """Make an adapter that says overused words and phrases no more, or as often as people do.

    It is made from the model's own texts after writing prompts, under its chat template where it has one, and ends in
    the adapter, a page that shows texts before and after, and the commands that export it.
    """
    from ..phrases.lists import overused

    patterns = overused(flags["add"], flags["keep"])
    if show:
        for pattern in patterns:
            say(pattern.text)
        return

    from ..errors import XFactorError
    from ..options import PhraseOptions
    from ..phrases.goals import PhraseGoal, PhraseTarget, Wanted
    from ..phrases.reference import like
    from ..phrases.rules import Rules

    measured = None
    if flags["rates_from"]:
        if ctx.get_parameter_source("rate") is click.core.ParameterSource.COMMANDLINE:
            raise XFactorError("--rate and --rates-from exclude each other; give one")
        target, measured = like(flags["rates_from"], patterns)
    else:
        target = PhraseTarget((PhraseGoal("overused words and phrases", patterns, Wanted.parse(flags["rate"])),))
    fit, held_out = prompts_of(flags)
    options = PhraseOptions(texts=flags["texts"], length=flags["length"], seed=flags["seed"])
    train_and_save(flags, Rules(target, tuple(fit), tuple(held_out), options=options), flags["output"], measured)
