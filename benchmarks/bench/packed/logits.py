"""Logits here and in llama.cpp on the same GGUF file, for every number format.

llama.cpp rounds activations to 8 bits (to 16 for F16 and BF16) before it multiplies by packed weights; nothing is
rounded here. So every format is compared twice: with llama.cpp on the very file, and with llama.cpp on a file of the
same unpacked weights in float32, where it rounds nothing either: what is left there is a difference of ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.export.gguf_copy import copy_gguf, packed
from xfactor_peft.export.gguf_lora import write_lora
from xfactor_peft.lowmem.gguf_file import GgufFile, read_gguf
from xfactor_peft.lowmem.gguf_formats import BY_NAME, Format
from xfactor_peft.options import LoadOptions

from ..store import Record
from ..tables import Table
from .llama import Llama

FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp's quantiser takes for rows that are not whole blocks of 256."""
WINDOW, ADAPTED = 250, 2
"""Tokens of a window, and windows that the adapter is compared on."""


def in_format(source: GgufFile, form: Format, output: Path) -> dict[str, int]:
    """Write `source` with all matrices in `form` (or its fallback); how many are of which."""
    changed, counts = {}, {}
    for name, tensor in source.tensors.items():
        if len(tensor.shape) < 2 or tensor.form.name == "F32":
            continue
        chosen = form if tensor.shape[-1] % form.weights == 0 else BY_NAME[FALLBACKS[form.name]]
        counts[chosen.name] = counts.get(chosen.name, 0) + 1
        if chosen is not tensor.form:
            changed[name] = packed(tensor, tensor.unpacked(torch.float32), chosen)
    copy_gguf(source, output, changed)
    return counts


def windows(tokenizer, text: str, tokens: int) -> list[list[int]]:
    """The first `tokens` of a text, as windows of `WINDOW`."""
    ids = tokenizer(text)["input_ids"][:tokens]
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens, {tokens} are wanted")
    return [ids[start : start + WINDOW] for start in range(0, tokens, WINDOW)]


def kl(theirs: Iterator[torch.Tensor], ours: Iterator[torch.Tensor]) -> Record:
    """KL(theirs || ours) per token: mean and largest."""
    found = []
    for z, o in zip(theirs, ours, strict=True):
        p, q = z.double().log_softmax(-1), o.double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    values = torch.cat(found)
    return {"mean": float(values.mean()), "largest": float(values.max()), "tokens": len(values)}


@torch.no_grad()
def measure(source: Path, form: str, adapter: str, root: Path, text: str, tokens: int) -> Record:
    """KL of base and adapter between llama.cpp and this package, for `source` in the format `form`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, plain, lora = folder / "file.gguf", folder / "plain.gguf", folder / "lora.gguf"
        counts = in_format(read_gguf(source), BY_NAME[form], file)
        in_format(read_gguf(file), BY_NAME["F32"], plain)
        bank = AdapterBank(load_base(resolve_model(str(file)), LoadOptions("fp32")), root)
        bank.load(adapter)
        write_lora(bank, Mix.of(adapter), lora)
        parts, result = windows(bank.base.tokenizer, text, tokens), {}
        for what, active in (("base", None), ("adapter", adapter)):
            bank.use(active)
            parts = parts if active is None else parts[:ADAPTED]
            ours = [bank.model(input_ids=torch.tensor([ids])).logits[0] for ids in parts]
            for where, path in (("file", file), ("float32", plain)):
                program = Llama(path, lora if active else None, context=WINDOW + 6, threads=torch.get_num_threads())
                result[f"{what} {where}"] = kl((program.logits(ids) for ids in parts), iter(ours))
                program.close()
        return {"format": form, "matrices": counts, "size": file.stat().st_size, "kl": result}


def table(records: list[Record]) -> str:
    """One row a format."""
    columns = ("base file", "base float32", "adapter file", "adapter float32")
    rows = [[r["format"], f"{r['size'] / 1e6:.0f}", *(f"{r['kl'][c]['mean']:.1e}" for c in columns)] for r in records]
    heads = ["base", "base, weights in float32", "adapter", "adapter, weights in float32"]
    return Table(["format", "MB", *heads], rows).markdown()
