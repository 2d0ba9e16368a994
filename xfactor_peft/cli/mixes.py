"""The --adapter option of `generate` and `eval`: columns of adapters and weighted mixes, with their token sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import Command, adapters_dir_option, apply_options, default_set
from .values import ADAPTER

if TYPE_CHECKING:
    from ..adapters.mix import Mix
    from ..bank.bank import AdapterBank
    from ..tokens.token_set import TokenSet


def adapter_options(function: Command) -> Command:
    """--adapter, --adapters-dir."""
    return apply_options(
        [
            click.option(
                "--adapter", "adapters", multiple=True, metavar="NAME[:WEIGHT]", type=ADAPTER,
                help="Name in the adapters folder, a path, or none; several are shown side by side. With weights "
                "(--adapter x:0.7 --adapter z:0.3, or x:0.7+z:0.3) they are added up.",
            ),
            adapters_dir_option,
        ],
        function,
        "Adapters",
    )  # fmt: skip


def load_mixes(bank: AdapterBank, texts: tuple[str, ...]) -> list[Mix]:
    """What the options mean, with every adapter loaded."""
    from ..adapters.adapter import list_adapters
    from ..adapters.mix import parse_mixes

    mixes = parse_mixes(texts, list_adapters(bank.root))
    for mix in mixes:
        for name in mix.names:
            bank.load(name)
    return mixes


def column_sets(bank: AdapterBank, mixes: list[Mix], given: TokenSet | None) -> list[list[TokenSet]]:
    """The sets whose R each column shows: the one given, else those its adapters were trained for.

    The base, and adapters without a rule, show the first set of any column, or the default one.
    """
    if given is not None:
        return [[given] for _ in mixes]
    own = [[s for name in mix.names if (s := bank.token_set(name)) is not None] for mix in mixes]
    distinct = [list({tokens.hash: tokens for tokens in sets}.values()) for sets in own]
    shared = next((sets[0] for sets in distinct if sets), None) or default_set(bank.base)
    return [sets or [shared] for sets in distinct]
