"""Thousands of damaged and hostile adapters: each is refused in one line or loads, and the model stays as it was.

    python benchmarks/fuzz_adapters.py --inputs 10000 --seed 0 --json benchmarks/results/reliability/fuzz_adapters.json

A tiny random model carries one good adapter at a scale of 0.7. Every input is a copy of another good adapter with one
to three mutations of its bytes, its JSON or its tensors. Counted are refusals by message and loads; all else (another
exception, more than `--seconds` for one input, a weight or an active adapter that changed, a file outside the input's
folder written to) is printed with the input's seed and makes the exit status 1.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import torch
from bench import tiny
from bench.mutations import mutate

from xfactor_peft.adapters.catalogue import catalogue, facts
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError


def prepare(work: Path) -> AdapterBank:
    """A model with one good adapter active, and another to mutate in `work/good` and `work/outside`."""
    model = tiny.make(work / "model")
    for name in ("kept", "good"):
        tiny.make_adapter(model, work / name)
    shutil.copytree(work / "good", work / "outside")
    (work / "catalogue").mkdir()
    bank = AdapterBank(tiny.load(model)[0], work)
    bank.load("kept")
    bank.use("kept", 0.7)
    return bank


def fingerprint(bank: AdapterBank) -> str:
    """Every weight, the modules' names and kinds, and what is active."""
    digest = hashlib.sha256(repr((bank.active, sorted(bank.adapters))).encode())
    for name, module in bank.base.model.named_modules():
        digest.update(f"{name} {type(module).__name__}".encode())
    for name, value in bank.base.model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def one_input(bank: AdapterBank, work: Path, seed: int, written: list[str]) -> str:
    """What became of one input: "loaded", or the refusal without what differs from input to input."""
    folder = work / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "good", folder)
    mutate(folder, seed)
    written.clear()
    try:
        facts(bank.load(str(folder)))
        try:
            bank.token_set(str(folder))
        finally:
            bank.unload(str(folder))
        outcome = "loaded"
    except XFactorError as error:
        outcome = " ".join(re.sub(r"\S*/\S+|'[^']*'|\"[^\"]*\"|[\d.]+", "_", str(error)).split())[:70]
    if seed % 10 == 0:
        (work / "catalogue" / "input").symlink_to(folder)
        catalogue(work / "catalogue")
        (work / "catalogue" / "input").unlink()
    assert not written, f"written to: {written}"
    return outcome


def fuzz(work: Path, inputs: int, seed: int, seconds: int) -> dict:
    bank, written, outcomes, failures, slowest = prepare(work), [], Counter(), [], 0.0
    before, outside, started = fingerprint(bank), _digest_of(work / "outside"), time.perf_counter()

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            written.append(str(arguments[0]))

    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, _too_long)
    for index in range(inputs):
        one, begun = seed * 1_000_003 + index, time.perf_counter()
        signal.alarm(seconds)
        try:
            outcomes[one_input(bank, work, one, written)] += 1
            if index % 20 == 0 or index == inputs - 1:
                assert fingerprint(bank) == before, "the model changed"
        except Exception as error:
            failures.append({"seed": one, "error": f"{type(error).__name__}: {error}"[:300]})
            click.echo(failures[-1])
            if fingerprint(bank) != before:
                click.echo("the model is not as it was; stopping")
                break
        finally:
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - begun)
    if _digest_of(work / "outside") != outside:
        failures.append({"error": "a file outside of the input's folder changed"})
    count = sum(outcomes.values())
    return {
        "inputs": count + len(failures), "seed": seed, "loaded": outcomes["loaded"],
        "refused": count - outcomes["loaded"], "failures": failures, "slowest_s": round(slowest, 2),
        "seconds": round(time.perf_counter() - started, 1), "kinds": dict(outcomes.most_common()),
    }  # fmt: skip


def _too_long(*_: object) -> None:
    raise TimeoutError("an input took too long")


def _digest_of(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


@click.command(help=__doc__.split("\n")[0])
@click.option("--inputs", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--seconds", default=20, show_default=True, help="Most that one input may take.")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(inputs: int, seed: int, seconds: int, file: Path | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = fuzz(Path(name), inputs, seed, seconds)
    tiny.conclude(file, {"inputs": inputs, "seed": seed}, result, ok=not result["failures"], hide=("kinds",))


if __name__ == "__main__":
    main()
