"""What swapping costs: latency of a switch and memory of an adapter, with many adapters resident on one base.

    python benchmarks/swap.py --adapters 50 --layers 24 --width 1024 --output benchmarks/results/swap/gpt2-medium.json

The base has random weights of the given shape (a switch does not look at them) and every adapter rank 8 on attention
and MLP. The figures count only if A -> B -> A gives the logits of A bit for bit; otherwise the script exits with 1.
"""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from bench.store import RESULTS, Record, provenance, resident_mib, write
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import xfactor_peft as xf
from xfactor_peft.lora.wrap import add_lora


def save_base(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """A GPT-2 of this shape with random weights, and a tokenizer of letters."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary, n_positions=128)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    letters = {chr(97 + i): i for i in range(26)} | {"X": 26, "<end>": 27}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def load(root: Path):
    return xf.load(str(root / "base"), xf.LoadOptions("bf16"), offline=True)


def save_adapter(root: Path, name: str, rank: int) -> int:
    """An adapter with random A and B; returns the bytes of its weights."""
    model = add_lora(load(root).model, xf.LoraOptions(r=rank))
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.data.normal_(std=0.02)
    model.save_pretrained(root / name, save_embedding_layers=False)
    return sum(weight.numel() * weight.element_size() for weight in weights)


def milliseconds(call: Callable[[str], object], names: list[str]) -> list[float]:
    """Of the call with each of the names."""
    found = []
    for name in names:
        started = time.perf_counter()
        call(name)
        found.append(1000 * (time.perf_counter() - started))
    return found


@torch.no_grad()
def measure(root: Path, adapters: int, switches: int, size: int) -> Record:
    names = [f"a{index}" for index in range(adapters)]
    for name in names:
        (root / name).symlink_to(root / ("second" if name == "a1" else "first"))
    bank = xf.AdapterBank(load(root), root)

    def logits(name: str) -> torch.Tensor:
        bank.use(name)
        return bank.model(input_ids=torch.arange(16)[None]).logits

    bank.load(names[0])
    first = logits(names[0])
    gc.collect()
    before, loads = resident_mib(), milliseconds(bank.load, names[1:])
    gc.collect()
    grown = (resident_mib() - before) / len(loads)
    switched = milliseconds(bank.use, (names * switches)[:switches])
    different, same = not torch.equal(logits(names[1]), first), torch.equal(logits(names[0]), first)
    plain = milliseconds(lambda name: bank.model.set_adapter(bank.peft_names[name], inference_mode=True), names[:5])
    return {
        "correct": different and same,
        "switch_ms": {"median": round(median(switched), 3), "max": round(max(switched), 3)},
        "peft_set_adapter_ms": {"median": round(median(plain), 3)},
        "load_ms": {"first": round(loads[0], 3), "last": round(loads[-1], 3)},
        "adapter_mib": round(size / 2**20, 3),
        "resident_mib_per_adapter": round(grown, 3),
    }


@click.command(help=__doc__.split("\n")[0])
@click.option("--adapters", type=click.IntRange(min=2), default=50, show_default=True)
@click.option("--layers", default=24, show_default=True)
@click.option("--width", default=1024, show_default=True)
@click.option("--vocabulary", default=50257, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--switches", default=200, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "swap" / "gpt2-medium.json")
def main(output: Path, **settings: int) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_base(root / "base", settings["layers"], settings["width"], settings["vocabulary"])
        size, _ = (save_adapter(root, adapter, settings["rank"]) for adapter in ("first", "second"))
        result = measure(root, settings["adapters"], settings["switches"], size)
    status = "ok" if result["correct"] else "failed"
    write(output, {"status": status, "settings": settings, **provenance(), **result})
    if not result["correct"]:
        raise click.ClickException("A -> B -> A is not bit-equal; the figures mean nothing")
    click.echo(result)


if __name__ == "__main__":
    main()
