"""GGUF files here and in llama.cpp: logits in every number format, and rates of adapters sampled by both.

    python benchmarks/packed.py logits --model FILE.gguf --adapter FOLDER --text PROSE.txt     one JSON a format
    python benchmarks/packed.py rates --model FILE.gguf --adapter FOLDER                       one JSON an adapter
    python benchmarks/packed.py decoding --model FILE.gguf                                     tokens a second of both
    python benchmarks/packed.py shape --model FILE.gguf --output build/llama-1b.Q4_K.gguf    Llama-3.2-1B's, random
    python benchmarks/packed.py format --model FILE.gguf Q8_0 --output FILE.Q8_0.gguf
    python benchmarks/packed.py whole NAME --model MODEL --allowance 550 -- --lora-r 8 --steps 10   the literal command
    python benchmarks/packed.py report                                                         tables of all of them

Needs the extra serve (xllamacpp and gguf). One JSON a row in benchmarks/results/gguf/.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from bench import store
from bench.packed import decoding as by_decoding
from bench.packed import logits as by_logits
from bench.packed import rates as by_rates
from bench.packed import whole as by_whole
from bench.store import RESULTS

from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.lowmem.gguf_formats import BY_NAME

FOLDER = RESULTS / "gguf"
FORMATS = "Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q4_K,Q5_K,Q6_K,F16,BF16"
_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    torch.set_num_threads(store.cores())


@main.command()
@click.option("--model", type=_FILE, required=True)
@click.option("--adapter", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True)
@click.option("--text", type=_FILE, required=True, help="English prose.")
@click.option("--tokens", default=2000, show_default=True)
@click.option("--formats", default=FORMATS, show_default=True)
@click.option("--force", is_flag=True, help="Measure again what has a result.")
def logits(model: Path, adapter: Path, text: Path, tokens: int, formats: str, force: bool) -> None:
    """KL per token between llama.cpp and this package, base and adapter."""
    prose = text.read_text(encoding="utf-8")[: 20 * tokens]
    for form in formats.split(","):
        output = FOLDER / f"logits-{form}.json"
        if force or not output.exists():
            record = by_logits.measure(model, form, adapter.name, adapter.parent, prose, tokens)
            store.write(output, {"model": model.name, "adapter": adapter.name, **record, **store.provenance()})
            click.echo(f"{form}: {record['kl']}")


@main.command()
@click.option("--model", type=_FILE, required=True)
@click.option("--adapter", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True)
@click.option("--scales", default="0,0.25,0.5,0.75,1", show_default=True)
@click.option("--texts", default=64, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Of each text.")
def rates(model: Path, adapter: Path, scales: str, texts: int, tokens: int) -> None:
    """R of an adapter at several scales, sampled here and by llama.cpp's server on the same file."""
    output = FOLDER / f"rates-{adapter.name}.json"
    values = [float(scale) for scale in scales.split(",")]
    record = by_rates.measure(model, adapter, values, texts, tokens)
    store.write(output, {"model": model.name, "adapter": adapter.name, **record, **store.provenance()})
    click.echo(by_rates.table([record]))


@main.command()
@click.option("--model", type=_FILE, required=True)
@click.option("--tokens", default=128, show_default=True, help="Of each text.")
def decoding(model: Path, tokens: int) -> None:
    """Tokens a second here and in llama.cpp's server, one text and several at a time."""
    record = {"model": model.name, **by_decoding.measure(model, tokens), **store.provenance()}
    store.write(FOLDER / f"decoding-{model.stem}.json", record)
    click.echo(by_decoding.table([record]))


@main.command()
@click.option("--model", type=_FILE, required=True, help="Whose tokenizer it takes.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
def shape(model: Path, output: Path) -> None:
    """Write Llama-3.2-1B's shape as Q4_K with random weights."""
    by_whole.write_llama_1b(output, read_gguf(model))


@main.command("format")
@click.option("--model", type=_FILE, required=True)
@click.argument("form", type=click.Choice(list(BY_NAME)))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
def format_(model: Path, form: str, output: Path) -> None:
    """Write a file again with its matrices in another format."""
    click.echo(by_logits.in_format(read_gguf(model), BY_NAME[form], output))


@main.command()
@click.argument("name")
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--allowance", type=int, help="MiB that it may take beside 1.1 times the file.")
@click.option("--threads", default=store.cores(), show_default=True)
@click.argument("words", nargs=-1)
def whole(name: str, model: Path, allowance: int | None, threads: int, words: tuple[str, ...]) -> None:
    """Peak and seconds a step of `xfactor train --model MODEL WORDS`."""
    run = by_whole.measure(["--model", str(model.resolve()), *words], threads)
    record = {"command": f"xfactor train --model {model.name} {' '.join(words)}", "allowance": allowance,
              "file": model.stat().st_size if model.is_file() else None, "run": run}  # fmt: skip
    store.write(FOLDER / f"whole-{name}.json", {**record, **store.provenance()})
    click.echo(by_whole.table([record]))


@main.command()
def report() -> None:
    """Tables of what is stored."""
    click.echo(write(FOLDER))


def write(folder: Path) -> str:
    """Write the tables of a folder's records, one file for each kind of them; returns all."""
    records, tables = store.read_all(folder), []
    for name, module, kind in (
        ("logits", by_logits, "kl"), ("rates", by_rates, "rates"), ("decoding", by_decoding, "decoding"),
        ("whole", by_whole, "run"),
    ):  # fmt: skip
        text = module.table([record for record in records if kind in record]) + "\n"
        tables.append(store.write_text(folder / f"{name}.md", text))
    return "\n".join(tables)


if __name__ == "__main__":
    main()
