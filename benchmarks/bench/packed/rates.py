"""R of an adapter at several scales, sampled by this package and by llama.cpp's server on the same GGUF file."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.export.serving import Place, start_server, write_adapters
from xfactor_peft.options import DEFAULT_PROMPTS, LoadOptions, SamplingOptions
from xfactor_peft.sampling.generation import encode_prompt
from xfactor_peft.sampling.intervals import rate_interval
from xfactor_peft.sampling.sampler import sample
from xfactor_peft.tokens.ends import special_ids
from xfactor_peft.tokens.token_set import TokenSet

from ..store import Record
from ..tables import Table
from .llama import Llama

COMPARED, AT_ONCE = 16, 8
"""Texts on which both give masses, and texts that the server makes at the same time."""


def _rate(rows: torch.Tensor, mask: torch.Tensor) -> Record:
    counts = mask[rows].sum(1)
    return {"rate": float(counts.sum() / rows.numel()), "interval": rate_interval(counts, rows.shape[1])}


class Server:
    """Texts from llama.cpp's server."""

    def __init__(self, file: Path, lora: dict[str, Path], banned: Sequence[int], parallel: int = AT_ONCE) -> None:
        place = Place(port=0, context=256, parallel=parallel, threads=torch.get_num_threads())
        self._server, self._banned = start_server(file, lora, place), [[i, False] for i in banned]

    def _one(self, prompt: list[int], length: int, seed: int, scale: float | None) -> list[int]:
        request = {
            "prompt": prompt, "n_predict": length, "seed": seed, "samplers": ["temperature"], "temperature": 1.0,
            "logit_bias": self._banned, "ignore_eos": True, "return_tokens": True,
            "lora": [] if scale is None else [{"id": 0, "scale": scale}],
        }  # fmt: skip
        call = urllib.request.Request(f"{self._server.listening_address}/completion", json.dumps(request).encode())
        call.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(call, timeout=600) as answer:
            return json.load(answer)["tokens"]

    def texts(self, prompts: list[list[int]], length: int, scale: float | None) -> torch.Tensor:
        """(N, length) ids."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = pool.map(lambda one: self._one(one[1], length, one[0] + 1, scale), enumerate(prompts))
            return torch.tensor(list(rows))


@torch.no_grad()
def measure(model: Path, adapter: Path, scales: list[float], texts: int, tokens: int) -> Record:
    """Rates with intervals of both, and the mass that both give to the set on the same texts of llama.cpp's."""
    bank = AdapterBank(load_base(resolve_model(str(model)), LoadOptions("fp32")), adapter.parent)
    bank.load(adapter.name)
    base, rule = bank.base, read_adapter(adapter).token_rule
    assert rule is not None
    members = TokenSet.from_rule(base.tokenizer, rule, vocab_size=base.vocab_size).mask()
    prompts = [encode_prompt(base.tokenizer, base.model, prompt, tokens) for prompt in DEFAULT_PROMPTS]
    prompts = [prompts[number % len(prompts)] for number in range(texts)]
    banned = sorted(special_ids(base.tokenizer, base.model))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        lora = write_adapters(bank, Path(name))
        server = Server(model, lora, banned)
        program = Llama(model, lora[adapter.name], context=256, threads=torch.get_num_threads())
        for scale in scales:
            bank.use(adapter.name, scale)
            program.use(scale)
            started = time.perf_counter()
            options = SamplingOptions(max_new_tokens=tokens, seed=7)
            ours = torch.cat([part.continuations for part in sample(split(base.model), prompts, options, banned)])
            middle = time.perf_counter()
            theirs = server.texts(prompts, tokens, scale)
            seconds = (middle - started, time.perf_counter() - middle)
            masses = torch.zeros(2, dtype=torch.float64)
            for prompt, row in zip(prompts[:COMPARED], theirs[:COMPARED].tolist(), strict=True):
                ids = prompt + row
                here = bank.model(input_ids=torch.tensor([ids])).logits[0]
                for number, logits in enumerate((here, program.logits(ids))):
                    z = logits[len(prompt) - 1 : -1].double().index_fill_(1, torch.tensor(banned), float("-inf"))
                    masses[number] += z.softmax(1)[:, members].sum() / (COMPARED * tokens)
            speed = [round(texts * tokens / one, 1) for one in seconds]
            rows.append({"scale": scale, "ours": _rate(ours, members), "llama.cpp": _rate(theirs, members),
                         "masses": masses.tolist(), "tokens a second": speed})  # fmt: skip
        program.close()
    return {"rule": rule.record(), "texts": texts, "length": tokens, "rates": rows}


def _cells(one: Record) -> str:
    low, high = one["interval"]
    return f"{one['rate']:.4f} ({low:.4f}–{high:.4f})"


def table(records: list[Record]) -> str:
    """One row an adapter and scale."""
    rows = []
    for record in records:
        for row in record["rates"]:
            ours, theirs = row["ours"], row["llama.cpp"]
            overlap = ours["interval"][0] <= theirs["interval"][1] and theirs["interval"][0] <= ours["interval"][1]
            mass = abs(row["masses"][0] - row["masses"][1])
            rows.append([
                record.get("adapter", ""), f"{record['texts']}", f"{row['scale']:g}", _cells(ours), _cells(theirs),
                "yes" if overlap else "no", f"{row['masses'][0]:.4f}", f"{mass:.4f}",
            ])  # fmt: skip
    head = ["adapter", "texts", "scale", "R here", "R in llama.cpp", "intervals overlap", "set mass",
            "difference of masses"]  # fmt: skip
    return Table(head, rows).markdown()
