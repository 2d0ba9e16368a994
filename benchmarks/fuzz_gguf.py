"""Mutated GGUF files: each is read as a whole model, or refused in one line; never a crash, never half of a model.

    python benchmarks/fuzz_gguf.py --count 1000 --json benchmarks/results/reliability/fuzz_gguf.json

Tiny random models (GPT-2, Llama, Gemma 3) with matrices in Q8_0 and Q4_1. Every case is read in a process of its own,
since a crash is one of the things looked for. What has to happen is known for each kind of mutation:

    header, counts, truncated, offsets, shapes, sizes    refused, or the same logits as before
    types, fields, elements (of lists), bytes            refused, or a whole model with finite logits
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from bench import store, tiny  # noqa: F401 (tiny puts the tests' models within reach)

from tests.base.gguf_models import random_model, write_gguf
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.export.gguf_copy import copy_gguf, packed
from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.lowmem.gguf_formats import BY_NAME
from xfactor_peft.options import LoadOptions

IDS, SECONDS = torch.arange(3, 27)[None], 30
SIZES = (0, 1, 2, 3, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
EXACT = ("header", "counts", "truncated", "offsets", "shapes", "sizes")
LOOSE = ("types", "fields", "elements", "bytes")


@dataclass(frozen=True)
class Source:
    """A file's bytes, and the places in it: (start of a 64-bit or 32-bit number, kind)."""

    name: str
    data: bytes
    places: dict[str, list[tuple[int, str]]]
    start: int
    logits: torch.Tensor


def places_of(path: Path) -> tuple[dict[str, list[tuple[int, str]]], int]:
    """Where counts, lengths, types, shapes and offsets stand, found by walking the file anew; where the data begins."""
    kinds = ("sizes", "types", "shapes", "offsets", "fields", "elements")
    data, found = path.read_bytes(), {kind: [] for kind in kinds}
    at = 24
    scalars = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form: str) -> int:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(f"<{form}", data, at - struct.calcsize(form))[0]

    def text() -> None:
        nonlocal at
        found["sizes"].append((at, "Q"))
        length = number("Q")
        at += length

    def value(kind: int, place: str = "fields") -> None:
        nonlocal at
        if kind in scalars:
            found[place].append((at, "Q" if scalars[kind] == 8 else "I" if scalars[kind] == 4 else "B"))
            at += scalars[kind]
        elif kind == 8:
            text()
        else:
            found["types"].append((at, "I"))
            inner = number("I")
            found["sizes"].append((at, "Q"))
            for _ in range(number("Q")):
                value(inner, "elements")

    tensors, fields = struct.unpack_from("<QQ", data, 8)
    for _ in range(fields):
        text()
        found["types"].append((at, "I"))
        value(number("I"))
    for _ in range(tensors):
        text()
        found["shapes"].append((at, "I"))
        for _ in range(number("I")):
            found["shapes"].append((at, "Q"))
            number("Q")
        found["types"].append((at, "I"))
        number("I")
        found["offsets"].append((at, "Q"))
        number("Q")
    return found, -(-at // 32) * 32


def mutated(source: Source, kind: str, dice: random.Random) -> bytes:
    """The file with one or two mutations of a kind."""
    data = bytearray(source.data)
    if kind == "truncated":
        end = dice.randrange(source.start if dice.random() < 0.5 else len(data))
        return bytes(data[:end])
    if kind in ("header", "counts"):
        place, form = dice.choice([(0, "I"), (4, "I")] if kind == "header" else [(8, "Q"), (16, "Q")])
        old = struct.unpack_from(f"<{form}", data, place)[0]
        new = dice.choice([*SIZES, old + 1, old - 1])
        struct.pack_into(f"<{form}", data, place, new % 2 ** (8 * struct.calcsize(form)))
        return bytes(data)
    for _ in range(dice.randint(1, 2)):
        if kind == "bytes":
            place = dice.randrange(24, len(data) if dice.random() < 0.3 else source.start)
            data[place] ^= 1 << dice.randrange(8)
            continue
        place, form = dice.choice(source.places[kind])
        size = struct.calcsize(form)
        old = struct.unpack_from(f"<{form}", data, place)[0]
        near = (old + 1, old - 1, old + 32, 2 * old, old // 2)
        floats = (0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000)  # NaN, ±inf, -1
        wrong = floats if kind in ("fields", "elements") else ()
        struct.pack_into(f"<{form}", data, place, dice.choice([*SIZES, *near, *wrong]) % 2 ** (8 * size))
    return bytes(data)


@torch.no_grad()
def judged(path: Path, kind: str, expected: torch.Tensor) -> str:
    """ "refused", "same", "another", or what is wrong."""
    try:
        base = load_base(resolve_model(str(path)), LoadOptions("fp32"))
    except XFactorError as error:
        line = str(error)
        return "refused" if "\n" not in line and len(line) < 1000 else f"WRONG: not one line: {line[:200]!r}"
    if any(value.is_meta for value in base.model.parameters()):
        return "WRONG: half-loaded"
    try:
        ids = IDS.remainder(base.vocab_size)
        base.tokenizer.decode(base.tokenizer("The fox")["input_ids"])
        logits = base.model(input_ids=ids).logits
    except Exception as error:
        return f"WRONG: read, and does not run: {type(error).__name__}: {str(error)[:200]}"
    if logits.shape == expected.shape and torch.equal(logits, expected):
        return "same"
    if kind in EXACT:
        return "WRONG: another model, read without a word"
    return "another" if torch.isfinite(logits).all() or kind == "bytes" else "WRONG: logits are not finite"


def apart(path: Path, kind: str, expected: torch.Tensor) -> str:
    """`judged` in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            word = judged(path, kind, expected)
        except BaseException as error:
            word = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
        os.write(writer, word.encode()[:2000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        word = pipe.read()
    _, status = os.waitpid(child, 0)
    return word or f"WRONG: the process died of signal {status & 127}"


def sources(folder: Path) -> list[Source]:
    found = []
    for kind in ("gpt2", "llama", "gemma3"):
        if kind == "gemma3":
            write_gguf(folder / "plain.gguf", random_model(kind))
        else:
            tiny_model_folder(kind, folder / kind)
            bank = AdapterBank(load_base(resolve_model(str(folder / kind)), LoadOptions("fp32")), folder)
            export(bank, Mix(), "gguf", folder / "plain.gguf", force=True)
        plain, path = read_gguf(folder / "plain.gguf"), folder / f"{kind}.gguf"
        changed = {
            name: packed(tensor, tensor.unpacked(torch.float32), BY_NAME["Q4_1" if "ffn" in name else "Q8_0"])
            for name, tensor in plain.tensors.items()
            if len(tensor.shape) > 1 and "position" not in name
        }
        copy_gguf(plain, path, changed)
        places, start = places_of(path)
        with torch.no_grad():
            logits = load_base(resolve_model(str(path)), LoadOptions("fp32")).model(input_ids=IDS).logits
        found.append(Source(kind, path.read_bytes(), places, start, logits))
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--count", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False))
def main(count: int, seed: int, output: Path | None) -> None:
    kinds = [*EXACT, *LOOSE]
    ends: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    wrong = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        made = sources(Path(name))
        path = Path(name) / "case.gguf"
        for number in range(count):
            turn, at = divmod(number, len(kinds))  # every kind meets every model
            kind, source, dice = kinds[at], made[turn % len(made)], random.Random(seed + number)
            path.write_bytes(mutated(source, kind, dice))
            end = apart(path, kind, source.logits)
            ends[kind][end.split(":")[0]] += 1
            if end.startswith("WRONG"):
                wrong.append(f"{number} {source.name} {kind}: {end}")
                click.echo(wrong[-1])
    click.echo({kind: dict(found) for kind, found in ends.items()})
    if output:
        store.write(output, {"count": count, "seed": seed, "ends": {k: dict(v) for k, v in ends.items()},
                             "wrong": wrong, **store.provenance()})  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
