"""`xfactor unslop`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import XFactorError
from ..options import PhraseOptions
from .common import model_options
from .config import config_option, given
from .console import json_option, print_json, say
from .help import Command
from .phrases import prompts_of, train_and_save

_DEFAULT = PhraseOptions()


@click.command(
    "unslop",
    cls=Command,
    first=("model", "rate", "add", "keep", "output"),
    examples=[
        "xfactor unslop --list",
        "xfactor unslop --model HuggingFaceTB/SmolLM2-135M-Instruct",
        'xfactor unslop --model MODEL --add "at the end of the day" --keep ancient',
        "xfactor unslop --model MODEL --rates-from my-own-prose.txt",
    ],
)
@config_option
@model_options
@click.option("--list", "show", is_flag=True, help="Print the list of words and phrases, and do nothing else.")
@click.option("--add", multiple=True, metavar="PHRASE", help="Also this one; repeatable.")
@click.option("--keep", multiple=True, metavar="PHRASE", help="Leave this one as it is; repeatable.")
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
    metavar="FILE",
    help="One a line, every second held out.  [default: 64 for writing]",
)
@click.option("--texts", default=_DEFAULT.texts, show_default=True, help="Texts of the base to learn from.")
@click.option("--length", default=_DEFAULT.length, show_default=True, help="Tokens of each.")
@click.option("--eval-texts", default=_DEFAULT.eval_texts, show_default=True, help="Texts on held-out prompts.")
@click.option("--lora-r", default=_DEFAULT.r, show_default=True, help="Rank of the adapter.")
@click.option("--seed", default=0, show_default=True, help="Of everything that is drawn.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="adapters/unslop", show_default=True,
    metavar="DIR", help="Where to write.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing output.")
@json_option
@click.pass_context
def command(ctx: click.Context, **flags: Any) -> None:
    """Make an adapter that says overused words and phrases no more, or as often as people do.

    It is made from the model's own texts after writing prompts, under its chat template where it has one, and ends in
    the adapter, a page that shows texts before and after, and the commands that export it.
    """
    from ..phrases.lists import overused

    patterns = overused(flags["add"], flags["keep"])
    if flags["show"]:
        if flags["as_json"]:
            return print_json([pattern.text for pattern in patterns])
        for pattern in patterns:
            say(pattern.text)
        return None

    from ..phrases.goals import PhraseGoal, PhraseTarget, Wanted
    from ..phrases.reference import like
    from ..phrases.rules import Rules

    measured = None
    if flags["rates_from"]:
        if given(ctx, "rate"):
            raise XFactorError("--rate and --rates-from exclude each other; give one")
        target, measured = like(flags["rates_from"], patterns)
    else:
        target = PhraseTarget((PhraseGoal("overused words and phrases", patterns, Wanted.parse(flags["rate"])),))
    fit, held_out = prompts_of(flags)
    options = PhraseOptions(
        r=flags["lora_r"], texts=flags["texts"], length=flags["length"], eval_texts=flags["eval_texts"],
        seed=flags["seed"],
    )  # fmt: skip
    train_and_save(
        ctx,
        {**flags, "rate": None} if measured else flags,
        Rules(target, tuple(fit), tuple(held_out), options=options),
        measured,
    )
