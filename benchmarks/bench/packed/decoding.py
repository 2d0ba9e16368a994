"""Tokens a second of this package and of llama.cpp's server on the same GGUF file, one text and several at a time."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.options import DEFAULT_PROMPTS, LoadOptions, SamplingOptions
from xfactor_peft.sampling.generation import encode_prompt
from xfactor_peft.sampling.sampler import sample
from xfactor_peft.tokens.ends import special_ids

from ..store import Record
from ..tables import Table
from .rates import AT_ONCE, Server

RUNS = 3


def _median(make) -> float:
    """Median seconds of `RUNS`, after one that is not counted."""
    found = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        make()
        found.append(time.perf_counter() - started)
    return median(found[1:])


@torch.no_grad()
def measure(model: Path, tokens: int) -> Record:
    """Texts of `tokens` tokens at temperature 1 behind the first prompts; reading the prompt is in the time of both."""
    base = load_base(resolve_model(str(model)), LoadOptions("fp32"))
    prompts = [encode_prompt(base.tokenizer, base.model, DEFAULT_PROMPTS[n % len(DEFAULT_PROMPTS)], tokens)
               for n in range(AT_ONCE)]  # fmt: skip
    banned, parts = sorted(special_ids(base.tokenizer, base.model)), split(base.model)
    options, rows = SamplingOptions(max_new_tokens=tokens, seed=7), []
    for count in (1, AT_ONCE):
        chosen = prompts[:count]
        ours = _median(lambda chosen=chosen: list(sample(parts, chosen, options, banned)))
        server = Server(model, {}, banned, parallel=count)
        theirs = _median(lambda chosen=chosen, server=server: server.texts(chosen, tokens, None))
        del server
        rows.append({"texts": count, "ours": count * tokens / ours, "llama.cpp": count * tokens / theirs})
    return {"length": tokens, "decoding": rows}


def table(records: list[Record]) -> str:
    """One row a file and number of texts."""
    rows = [
        [record["model"], f"{row['texts']}", f"{row['ours']:.0f}", f"{row['llama.cpp']:.0f}",
         f"{record['hardware']['threads']}"]
        for record in records for row in record["decoding"]
    ]  # fmt: skip
    return Table(["file", "texts at a time", "tokens a second here", "in llama.cpp", "threads"], rows).markdown()
