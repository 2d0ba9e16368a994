"""`xfactor adapters list|show|verify|rename|remove|merge|diff|push|pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..tokens.printable import printable
from .common import adapters_dir_option, base_options, load, own_base
from .console import json_option, print_json, say
from .flags import as_flags
from .help import Group
from .values import ADAPTER


@click.group("adapters", cls=Group)
def command() -> None:
    """Look after the adapters in a folder."""


@command.command("list", examples=["xfactor adapters list"])
@adapters_dir_option
@json_option
def list_command(adapters_dir: Path, as_json: bool) -> None:
    """Every adapter with its base, token sets, the rates wanted and measured, and its size."""
    from dataclasses import asdict

    from rich.table import Table

    from ..adapters.catalogue import catalogue
    from .console import console

    entries = catalogue(adapters_dir)
    if as_json:
        print_json([asdict(entry) for entry in entries])
    if not entries:
        console.print(f"no adapter in {adapters_dir}/")
        return
    table = Table("name", "base", "tokens", "wanted", "R", "parameters", box=None, pad_edge=False)
    for entry in entries:
        rate = "" if entry.rate is None else f"{entry.rate:.4f}"
        row = [entry.name, entry.base, entry.tokens, entry.wanted, rate, f"{entry.parameters:,}"]
        table.add_row(*(row if entry.problem is None else [entry.name, f"damaged: {as_flags(entry.problem)}"]))
    console.print(table)


@command.command("show", examples=["xfactor adapters show demo-rate", "xfactor adapters show demo-rate --json"])
@click.argument("name", type=ADAPTER)
@adapters_dir_option
@json_option
def show_command(name: str, adapters_dir: Path, as_json: bool) -> None:
    """What an adapter is and how it came to be."""
    from ..adapters.adapter import find_adapter, read_adapter
    from ..adapters.catalogue import facts
    from .console import console

    info = read_adapter(find_adapter(name, adapters_dir))
    for label, value in facts(info).items():
        for number, line in enumerate(str(value).split("\n")):
            console.print(f"{label + ':' if number == 0 else '':16}{line}", soft_wrap=True)
    if as_json:
        print_json({**facts(info), "record": info.record})


@command.command(
    "verify",
    first=("files_only", "adapters_dir", "as_json", "model", "offline"),
    examples=["xfactor adapters verify demo-X", "xfactor adapters verify demo-X --files-only"],
)
@click.argument("name", type=ADAPTER)
@adapters_dir_option
@click.option("--files-only", is_flag=True, help="Re-hash only; load no model.")
@base_options
@json_option
@click.pass_context
def verify_command(ctx: click.Context, name: str, adapters_dir: Path, files_only: bool, **flags: Any) -> None:
    """Re-hash the files and test the adapter on its base; exit status 1 when a check fails."""
    from ..bank.verification import FAILED, OK, verify, verify_files
    from .console import console

    if files_only:
        checks = verify_files(name, adapters_dir)[1]
    else:
        checks = verify(name, load(own_base(flags, [name], adapters_dir)), adapters_dir)
    for check in checks:
        style = {OK: "green", FAILED: "bold red"}.get(check.outcome, "yellow")
        console.print(f"{check.name + ':':12}", end="")
        console.print(f"{check.outcome:12}", end="", style=style)
        console.print(as_flags(check.detail), soft_wrap=True)
    if flags["as_json"]:
        print_json({check.name: {"outcome": check.outcome, "detail": check.detail} for check in checks})
    if any(check.outcome == FAILED for check in checks):
        ctx.exit(1)


@command.command("rename", examples=["xfactor adapters rename X-lora-r8 favourite"])
@click.argument("name", type=ADAPTER)
@click.argument("new")
@adapters_dir_option
def rename_command(name: str, new: str, adapters_dir: Path) -> None:
    """Give an adapter another name."""
    from ..adapters.catalogue import rename_adapter

    say(f"{name} is now {rename_adapter(name, new, adapters_dir)}")


@command.command("remove", examples=["xfactor adapters remove X-lora-r8 --yes"])
@click.argument("name", type=ADAPTER)
@adapters_dir_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove_command(name: str, adapters_dir: Path, yes: bool) -> None:
    """Delete an adapter."""
    from ..adapters.catalogue import remove_adapter

    if not yes:
        click.confirm(printable(f"Delete {adapters_dir / name}?"), abort=True)
    say(f"removed {remove_adapter(name, adapters_dir)}")


@command.command("merge", examples=["xfactor adapters merge X-and-Z demo-X:0.7 demo-Z:0.3"])
@click.argument("new")
@click.argument("parts", nargs=-1, required=True, metavar="NAME[:WEIGHT]...")
@adapters_dir_option
@click.option("--force", is_flag=True, help="Replace an existing adapter.")
def merge_command(new: str, parts: tuple[str, ...], adapters_dir: Path, force: bool) -> None:
    """Write the weighted sum of adapters as one adapter, NEW; needs no model."""
    from ..adapters.adapter import list_adapters
    from ..adapters.combine import combine
    from ..adapters.mix import Mix, parse_mix

    known = list_adapters(adapters_dir)
    mix = Mix(tuple(pair for part in parts for pair in parse_mix(part, known).parts))
    combine(mix, adapters_dir / new, adapters_dir, force=force)
    say(f"{adapters_dir / new} = {mix}; measure it with: xfactor eval --adapter {new}")


@command.command("diff", examples=["xfactor adapters diff demo-X demo-Z"])
@click.argument("first", type=ADAPTER)
@click.argument("second", type=ADAPTER)
@adapters_dir_option
@json_option
def diff_command(first: str, second: str, adapters_dir: Path, as_json: bool) -> None:
    """Where two adapters differ: settings, and how alike their updates of each layer are."""
    from rich.table import Table

    from ..adapters.adapter import find_adapter, read_adapter
    from ..adapters.compare import compare
    from .console import console

    result = compare(*(read_adapter(find_adapter(name, adapters_dir)) for name in (first, second)))
    settings = Table("", first, second, box=None, pad_edge=False)
    for label, values in result.settings.items():
        settings.add_row(label, *("" if value is None else str(value) for value in values))
    console.print(settings)
    layers = Table("update of", f"norm, {first}", f"norm, {second}", "cosine", box=None, pad_edge=False)
    for name, (one, two, cosine) in result.layers.items():
        layers.add_row(name, f"{one:.4g}", f"{two:.4g}", f"{cosine:+.4f}")
    console.print(layers)
    console.print(f"cosine of the updates as a whole {result.cosine:+.4f}")
    if as_json:
        print_json({"settings": result.settings, "layers": result.layers, "cosine": result.cosine})


@command.command("push", examples=["xfactor adapters push demo-X someone/demo-x --private"])
@click.argument("name", type=ADAPTER)
@click.argument("repo", metavar="OWNER/NAME")
@adapters_dir_option
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push_command(name: str, repo: str, adapters_dir: Path, private: bool) -> None:
    """Upload an adapter to the Hub."""
    from ..adapters.adapter import find_adapter
    from ..adapters.hub import push

    say(f"pushed to {push(find_adapter(name, adapters_dir), repo, private=private or None)}")


@command.command("pull", examples=["xfactor adapters pull someone/demo-x --as theirs"])
@click.argument("repo", metavar="OWNER/NAME")
@adapters_dir_option
@click.option("--as", "name", metavar="NAME", help="Its name here.  [default: the repository's]")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--force", is_flag=True, help="Replace an existing adapter.")
def pull_command(repo: str, adapters_dir: Path, name: str | None, revision: str | None, force: bool) -> None:
    """Download an adapter from the Hub into the folder of adapters."""
    from ..adapters.hub import pull

    say(f"pulled {pull(repo, adapters_dir, name, revision=revision, force=force)}")
