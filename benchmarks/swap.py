"""What swapping costs: latency of a switch and memory of an adapter, with many adapters resident on one base.

    python benchmarks/swap.py --adapters 50 --layers 24 --width 1024 --output benchmarks/results/swap/gpt2-medium.json

The base has random weights of the given shape (a switch does not look at them) and every adapter rank 8 on attention
and MLP. The figures count only if A -> B -> A gives the logits of A bit for bit; otherwise the script exits with 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from bench.provenance import provenance
from bench.store import write
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


def save_adapter(base_folder: Path, folder: Path, rank: int) -> int:
    """An adapter with random A and B; returns the bytes of its weights."""
    base = xf.load(str(base_folder), xf.LoadOptions("bf16"), offline=True)
    model = add_lora(base.model, xf.LoraOptions(r=rank))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)


@torch.no_grad()
def measure(options: argparse.Namespace, root: Path) -> dict:
    save_base(root / "base", options.layers, options.width, options.vocabulary)
    names = [f"a{i}" for i in range(options.adapters)]
    size = save_adapter(root / "base", root / "a0", options.rank)
    for name in names[1:]:
        (root / name).symlink_to(root / ("b" if name == "a1" else "a0"))
    save_adapter(root / "base", root / "b", options.rank)
    bank = xf.AdapterBank(xf.load(str(root / "base"), xf.LoadOptions("bf16"), offline=True), root)
    ids = torch.arange(16).remainder(28)[None]
    bank.load(names[0])
    bank.use(names[0])
    first = bank.model(input_ids=ids).logits
    gc.collect()
    before, loads = resident(), []
    for name in names[1:]:
        started = time.perf_counter()
        bank.load(name)
        loads.append(time.perf_counter() - started)
    gc.collect()
    per_adapter = (resident() - before) / max(1, len(names) - 1)
    switches, peft_switches = [], []
    for i in range(options.switches):
        started = time.perf_counter()
        bank.use(names[i % len(names)])
        switches.append(time.perf_counter() - started)
    bank.use(names[1])
    other = bank.model(input_ids=ids).logits
    bank.use(names[0])
    exact = torch.equal(bank.model(input_ids=ids).logits, first) and not torch.equal(first, other)
    for i in range(5):
        started = time.perf_counter()
        bank.model.set_adapter(bank.peft_names[names[i]], inference_mode=True)
        peft_switches.append(time.perf_counter() - started)
    return {
        "correct": exact,
        "switch_ms": {"median": _ms(statistics.median(switches)), "max": _ms(max(switches))},
        "peft_set_adapter_ms": {"median": _ms(statistics.median(peft_switches))},
        "load_ms": {"first": _ms(loads[0]), "last": _ms(loads[-1])},
        "adapter_mib": round(size / 2**20, 3),
        "resident_mib_per_adapter": round(per_adapter, 3),
    }


def resident() -> float:
    """Resident set now, MiB; 0 where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("adapters", 50), ("layers", 24), ("width", 1024), ("vocabulary", 50257), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/swap/gpt2-medium.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        result = measure(options, Path(root))
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    write(options.output, {"settings": settings, **provenance(), **result})
    if not result["correct"]:
        sys.exit("A -> B -> A is not bit-equal; the figures mean nothing")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
