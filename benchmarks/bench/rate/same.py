"""Whether a rate holds after prompts that it was not calibrated on, in long texts and under other decodings."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import torch

import xfactor_peft as xf
from xfactor_peft.base.split_model import split
from xfactor_peft.lora.wrap import adapter_off
from xfactor_peft.options import RateOptions
from xfactor_peft.sampling.contexts import tokens_left
from xfactor_peft.sampling.family_samples import FamilySamples
from xfactor_peft.sampling.intervals import mean_interval
from xfactor_peft.sampling.prompt_families import HELD_OUT, bundled, encode
from xfactor_peft.sampling.sampler import sample
from xfactor_peft.tokens.ends import special_ids

from .. import store
from ..process import OnStep
from ..store import Record

LENGTH, LONG, WINDOW = 64, 1024, 64


def measure(spec: Record, on_step: OnStep) -> Record:
    """The figures of {"model", "label", "dtype", "contains", "wanted", "seed", "texts", "long_texts", decoding}."""
    base = xf.load(spec["model"], xf.LoadOptions(dtype=spec["dtype"]), offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, spec["contains"], ignore_case=True, vocab_size=base.vocab_size)
    options = RateOptions(temperature=spec["temperature"], top_p=spec["top_p"])
    objective = xf.ObjectiveOptions(dial=False, rate=options)
    wall, cpu = time.perf_counter(), time.process_time()
    result = xf.train(
        base, xf.TiltedTarget.of(tokens, spec["wanted"]), xf.TrainOptions(seed=spec["seed"]), None, None, objective
    )  # fmt: skip
    seconds = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    on_step(1, 0.0)
    members = tokens.mask(base.device)[None].float()
    prompts = encode(base, bundled(HELD_OUT), LENGTH)
    samples = FamilySamples(base, split(base.model), members, prompts, options.decoding(LENGTH))
    seed = 900_000 + spec["seed"]
    found = {"head": samples.rates(spec["texts"], seed)}
    assert result.rate is not None
    with adapter_off(result.model):
        constant = torch.tensor(result.rate.strengths).expand(len(prompts), -1)
        found["constant"] = samples.rates(spec["texts"], seed, constant)
    on_step(2, 0.0)
    return {
        **seconds,
        "rate": result.rate.record(),
        "tokens": tokens.record(),
        "base": {**base.record(), "name": spec["label"]},
        "held_out": {name: _rows(samples.names, rates[..., 0]) for name, rates in found.items()},
        "windows": windows(base, result, members, options, spec) if spec["long_texts"] else None,
    }


def _rows(names: list[str], rates: torch.Tensor) -> Record:
    """R of every family with its interval, from (F, N) texts."""
    return {
        name: {"rate": float(texts.mean()), "interval": mean_interval(texts[:, None])}
        for name, texts in zip(names, rates, strict=True)
    }


def windows(base, result, members: torch.Tensor, options: RateOptions, spec: Record) -> Record:
    """Expected R in every window of 64 tokens of long texts after held-out prompts, and its slope.

    The slope is that of R against the number of the window, by least squares in each text; its error is 1.96 standard
    errors between texts.
    """
    count = spec["long_texts"]
    prompts = [row for family in encode(base, bundled(HELD_OUT), LENGTH).values() for row in family]
    rows = prompts[:: max(1, len(prompts) // count)][:count]
    length = min(LONG, tokens_left(base, max(map(len, rows)))) // WINDOW * WINDOW
    found: Record = {}
    for name in ("head", "constant"):
        constant = name == "constant"
        with adapter_off(result.model) if constant else nullcontext():
            strength = torch.tensor(result.rate.strengths if constant else [0.0])
            batches = sample(
                split(base.model), rows, options.decoding(length, 77 + spec["seed"]),
                sorted(special_ids(base.tokenizer, base.model)), members, strength.float().expand(len(rows), -1),
            )  # fmt: skip
            masses = torch.cat([batch.masses for batch in batches])[..., 0].double()
        parts = masses.view(len(masses), -1, WINDOW).mean(2)
        x = torch.arange(parts.shape[1], dtype=torch.float64)
        x = x - x.mean()
        slopes = parts @ x / x.square().sum()
        error = 1.96 * float(slopes.std()) / len(slopes) ** 0.5
        found[name] = {"rates": parts.mean(0).tolist(), "slope": float(slopes.mean()), "error": error}
    return found


def report(records: list[Record]) -> str:
    """One row a record: how many held-out families hold the rate, of head and constant, price, drift, time."""
    lines = [
        "| model | wanted R | T, top-p | held-out families within max(0.004, 8 %): head | constant | head's R "
        "| constant's R | KL / I-projection | KL / constant | slope of R per window: head | CPU s |",
        "|" + "---|" * 11,
    ]
    for record in sorted(records, key=lambda r: (r["spec"]["model"], r["spec"]["wanted"], -r["spec"]["temperature"])):
        spec, head = record["spec"], record["rate"]["head"]
        wanted, most = spec["wanted"], max(0.004, 0.08 * spec["wanted"])
        cells = {}
        for name, rows in record["held_out"].items():
            rates = [row["rate"] for row in rows.values()]
            good = sum(abs(rate - wanted) <= most for rate in rates)
            cells[name] = (f"{good} of {len(rates)}", " ".join(f"{rate:.3f}" for rate in rates))
        drift = record["windows"]
        slope = f"{drift['head']['slope']:+.5f} ± {drift['head']['error']:.5f}" if drift else "–"
        lines.append(
            f"| {spec['label']} | {wanted:g} | {spec['temperature']:g}, {spec['top_p']:g} | {cells['head'][0]} | "
            f"{cells['constant'][0]} | {cells['head'][1]} | {cells['constant'][1]} | "
            f"{head['kl'] / head['kl_of_teacher']:.3f} | {head['price']:.3f} | {slope} | {record['cpu']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path) -> str:
    """Write the table of the records in `folder` beside them; returns it."""
    good = [record for record in store.read_all(folder) if record["status"] == "ok"]
    return store.write_text(folder / "same.md", report(good))
