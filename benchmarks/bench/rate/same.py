"""Whether a rate holds after prompts that it was not calibrated on, in long texts and under other decodings."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

import xfactor_peft as xf
from xfactor_peft.adapters.mix import parse_mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import split
from xfactor_peft.export import export
from xfactor_peft.options import RateOptions, Recipe, SamplingOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.sampling.contexts import tokens_left
from xfactor_peft.sampling.family_samples import FamilySamples
from xfactor_peft.sampling.intervals import mean_interval
from xfactor_peft.sampling.prompt_families import HELD_OUT, bundled, encode

from .. import store
from ..process import OnStep
from ..store import Record
from ..tables import NONE, Table

LENGTH, LONG, WINDOW = 64, 1024, 64
HEAD, CONSTANT = "head", "constant"
ARMS = {HEAD: None, CONSTANT: "on-average"}
"""What is compared, and its `same_rate`."""


def measure(spec: Record, on_step: OnStep) -> Record:
    """The figures of one arm: {"arm", "model", "label", "contains", "wanted", "seed", "texts", "long_texts", "merged",
    "temperature", "top_p"}."""
    base = xf.load(spec["model"], offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, spec["contains"], ignore_case=True, vocab_size=base.vocab_size)
    rate = RateOptions(ARMS[spec["arm"]], temperature=spec["temperature"], top_p=spec["top_p"])
    recipe = Recipe(
        xf.TrainOptions(seed=spec["seed"]), evaluation=None, objective=xf.ObjectiveOptions(dial=False, rate=rate)
    )
    with TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        result, _ = train_to_folder(base, xf.TiltedTarget.of(tokens, spec["wanted"]), Path(folder) / "arm", recipe)
        seconds = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        on_step(1, 0.0)
        members, seed = tokens.mask(base.device)[None].float(), 900_000 + spec["seed"]
        held_out = texts_of(base, members, rate.decoding(LENGTH)).rates(spec["texts"], seed)[..., 0]
        on_step(2, 0.0)
        return {
            **seconds,
            "rate": result.rate.record(),
            "tokens": tokens.record(),
            "base": {**base.record(), "name": spec["label"]},
            "held_out": _rows(list(encode(base, bundled(HELD_OUT), LENGTH)), held_out),
            "windows": windows(base, members, rate, spec) if spec["long_texts"] else None,
            "merged": merged(spec, Path(folder), members, rate) if spec["merged"] else None,
        }


def texts_of(base: Base, members: torch.Tensor, decoding: SamplingOptions) -> FamilySamples:
    """Samples of the model as it is after held-out prompts."""
    prompts = encode(base, bundled(HELD_OUT), decoding.max_new_tokens)
    return FamilySamples(base, split(base.model), members, prompts, decoding)


def _rows(names: list[str], rates: torch.Tensor) -> Record:
    """R of every family with its interval and the spread between texts, from (F, N) texts."""
    return {
        name: {"rate": float(texts.mean()), "interval": mean_interval(texts[:, None]), "spread": float(texts.std())}
        for name, texts in zip(names, rates, strict=True)
    }


def windows(base: Base, members: torch.Tensor, rate: RateOptions, spec: Record) -> Record:
    """Expected R in every window of 64 tokens of long texts, and its slope from one window to the next.

    The slope is that of least squares in each text; its error is 1.96 standard errors between texts.
    """
    length = min(LONG, tokens_left(base, 64)) // WINDOW * WINDOW
    samples = texts_of(base, members, rate.decoding(length))
    masses = samples.masses(spec["long_texts"], 77 + spec["seed"])[..., 0].double()
    parts = masses.view(len(masses), -1, WINDOW).mean(2)
    x = torch.arange(parts.shape[1], dtype=torch.float64)
    x = x - x.mean()
    slopes = parts @ x / x.square().sum()
    error = 1.96 * float(slopes.std()) / len(slopes) ** 0.5
    return {"rates": parts.mean(0).tolist(), "slope": float(slopes.mean()), "error": error, "texts": len(parts)}


def merged(spec: Record, folder: Path, members: torch.Tensor, rate: RateOptions) -> Record:
    """R after held-out prompts of the merged model that plain transformers has loaded, and what the export said."""
    bank = AdapterBank(xf.load(spec["model"], xf.LoadOptions(dtype="fp32"), offline=True), folder)
    bank.load("arm")
    base = bank.base
    said = export(bank, parse_mix("arm", ["arm"]), "merged", folder / "merged")
    again = replace(base, model=AutoModelForCausalLM.from_pretrained(folder / "merged", local_files_only=True).eval())
    rates = texts_of(again, members, rate.decoding(LENGTH)).rates(spec["texts"], 900_000 + spec["seed"])
    return {"rate": float(rates.mean()), "said": said.replace(str(folder), "")}


def most_missed(wanted: float) -> float:
    """By which a cell may miss its rate."""
    return max(0.004, 0.08 * wanted)


def report(records: list[Record]) -> str:
    """A table of held-out families, one row for a model, a rate, a decoding and an arm; and one of long texts."""
    groups = defaultdict(list)
    for record in records:
        spec = record["spec"]
        groups[spec["label"], spec["wanted"], -spec["temperature"], -spec["top_p"], spec["arm"] != HEAD].append(record)
    heads = [
        "model", "wanted R", "T, top-p", "arm", "seeds", "cells held", "mean R", "lowest and highest cell",
        "spread between texts", "KL, nats/token", "/ a constant a family", "/ one constant", "merged: R", "CPU s",
    ]  # fmt: skip
    rates = Table(heads, [_row(group) for _, group in sorted(groups.items())])
    long = Table(
        ["model", "wanted R", "arm", "texts", "R in windows of 64 tokens", "slope per window"],
        [_drift(record["spec"], record["windows"]) for record in records if record["windows"]],
    )
    return f"{rates.markdown(aligned=False)}\n\n{long.markdown(aligned=False)}\n"


def _drift(spec: Record, drift: Record) -> list[str]:
    rates = " ".join(f"{rate:.3f}" for rate in drift["rates"])
    slope = f"{drift['slope']:+.5f} ± {drift['error']:.5f}"
    return [spec["label"], f"{spec['wanted']:g}", spec["arm"], str(drift["texts"]), rates, slope]


def _row(group: list[Record]) -> list[str]:
    spec, cells = group[0]["spec"], [row for record in group for row in record["held_out"].values()]
    wanted, rates = spec["wanted"], [cell["rate"] for cell in cells]
    good = sum(abs(rate - wanted) <= most_missed(wanted) for rate in rates)
    fits = [record["rate"]["head"] for record in group if record["rate"]["head"]]
    prices = [f"{mean(f['kl'] for f in fits):.4f}"] if fits else [NONE]
    for other in ("kl_of_teacher", "kl_of_constant"):
        prices.append(f"{mean(f['kl'] / f[other] for f in fits):.3f}" if fits else NONE)
    again = [f"{r['merged']['rate']:.4f}" for r in group if r["merged"]]
    return [
        spec["label"], f"{wanted:g}", f"{spec['temperature']:g}, {spec['top_p']:g}", spec["arm"], str(len(group)),
        f"{good} of {len(cells)}", f"{mean(rates):.4f}", f"{min(rates):.3f} {max(rates):.3f}",
        f"{mean(cell['spread'] for cell in cells):.3f}", *prices, " ".join(again) or NONE,
        f"{mean(record['cpu'] for record in group):.0f}",
    ]  # fmt: skip


def write(folder: Path) -> str:
    """Write the tables of the records in `folder` beside them; returns them."""
    good = [record for record in store.read_all(folder) if record["status"] == "ok"]
    return store.write_text(folder / "same.md", report(good))
