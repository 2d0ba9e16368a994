"""`xfactor cache`."""

from __future__ import annotations

import time

import click

from .console import json_option, print_json, say
from .help import Command


@click.command(
    "cache",
    cls=Command,
    examples=["xfactor cache", "xfactor cache --clear", "xfactor cache --clear --model demo"],
)
@click.option("--model", metavar="NAME", help="Only the files of this model, as they are listed.")
@click.option("--clear", is_flag=True, help="Remove them; the next run with --weights mapped writes its own anew.")
@json_option
def command(model: str | None, clear: bool, as_json: bool) -> None:
    """List the files that `--weights mapped` has written, the one used last first.

    They lie in $XFACTOR_CACHE, by default xfactor-peft in your folder of caches, and take at most 32 GiB: what was not
    used for longest makes room.
    """
    from ..base import weight_cache
    from ..lowmem.memory import mib

    files = [one for one in weight_cache.cached() if model in (None, one.about.get("model"))]
    for one in files:
        kind = ", ".join(one.about[key] for key in ("model", "quantization", "dtype") if key in one.about)
        say(f"{one.path.name}  {mib(one.size)}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(one.used))}  {kind}")
    total = sum(one.size for one in files)
    if clear:
        weight_cache.clear(files)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    say(f"{count}, {mib(total)}{', removed' if clear else ''}: {weight_cache.cache_folder()}")
    if as_json:
        found = [{"file": str(one.path), "bytes": one.size, "used": one.used, **one.about} for one in files]
        print_json({"files": found, "bytes": total, "removed": clear})
