"""Rates: what each way to a wanted R costs, against the exact logit bias.

    python benchmarks/rate.py run --model demo            every arm that has no result yet
    python benchmarks/rate.py run --arms tilt,sequence --rates 0.1 --seeds 0
    python benchmarks/rate.py report                      table.md and rate-kl.png from the results

One JSON a run in benchmarks/results/rate/: arm, settings, scores, versions, machine. The prompts of the scores are not
those of the calibration, which starts from openings that the base writes. A run that failed keeps its row.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from bench.provenance import provenance
from rate_rl import rl_arm

import xfactor_peft as xf
from xfactor_peft.base.split_model import SplitModel, split
from xfactor_peft.lora.wrap import adapter_off

RESULTS = Path(__file__).parent / "results" / "rate"
RATES = (0.02, 0.05, 0.10, 0.30, 0.60)
STRENGTHS = (1.0, 2.0, 2.8, 3.3, 3.7, 4.2, 4.8, 5.4, 6.2, 7.5)
ARMS = (
    "bias", "tilt", "suppress", "blocks-r1", "blocks-r4", "blocks-r16", "uniform-lora", "uniform-full",
    "trl", "sequence",
)  # fmt: skip
FEW = ("blocks-r1", "blocks-r4", "blocks-r16", "trl")
"""Arms that are run at --few-rates."""


def evaluation(seed: int) -> xf.EvalOptions:
    return xf.EvalOptions(repeats=16, sampling=xf.SamplingOptions(max_new_tokens=64, seed=1000 + seed))


def target_of(arm: str, tokens, rate: float):
    if arm.startswith("uniform"):
        return xf.UniformTarget(tokens)
    return xf.TiltedTarget.of(tokens, 0.0 if arm == "suppress" else rate)


def lora_of(arm: str) -> xf.LoraOptions | None:
    if arm.startswith("blocks"):
        r = int(arm.removeprefix("blocks-r"))
        return xf.LoraOptions(r=r, alpha=2 * r, target="all")
    return None


def run_arm(arm: str, rate: float, seed: int, options: argparse.Namespace) -> dict:
    """Train and score one arm; returns what is written."""
    base = xf.load(options.model, xf.LoadOptions(dtype=options.dtype), offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, options.contains, ignore_case=True, vocab_size=base.vocab_size)
    if arm == "bias":
        return bias_curve(base, tokens, seed)
    if arm == "trl":
        model, record = rl_arm(base, tokens, rate, seed, options.sequence_steps)
        off = partial(adapter_off, model)
        scores = xf.evaluate(split(base.model), base.tokenizer, tokens, evaluation(seed), adapter_off=off)
        return {**record, "base": base.record(), "tokens": tokens.record(), "after": scores.record()}
    method = "full" if arm == "uniform-full" else "lora"
    objective = xf.ObjectiveOptions(
        sequence_level=arm == "sequence", sequence_steps=options.sequence_steps, dial=False, frontier=False
    )
    train = xf.TrainOptions(method=method, seed=seed)
    quick = xf.EvalOptions(repeats=1, sampling=xf.SamplingOptions(max_new_tokens=8))  # the scores proper come below
    started = time.process_time()
    result = xf.train(base, target_of(arm, tokens, rate), train, lora_of(arm), quick, objective)
    cpu = time.process_time() - started
    if method == "full":
        reference = split(xf.load(options.model, xf.LoadOptions(dtype=options.dtype), offline=True).model)
        scores = xf.evaluate(split(base.model), base.tokenizer, tokens, evaluation(seed), base=reference)
    else:
        off = partial(adapter_off, result.model)
        scores = xf.evaluate(split(base.model), base.tokenizer, tokens, evaluation(seed), adapter_off=off)
    return {**result.record(), "before": None, "after": scores.record(), "history": thin(result.history), "cpu": cpu}


def thin(history: list) -> list[dict]:
    """Every step of a short run, every tenth of a long one."""
    return [asdict(step) for step in history[:: 10 if len(history) > 150 else 1]]


def bias_curve(base, tokens, seed: int) -> dict:
    """The frontier itself: the base and ten strengths of an exact logit bias."""
    split_model, mask, points = split(base.model), tokens.mask().float(), []
    for strength in (0.0, *STRENGTHS):
        tilted = SplitModel(base.model, strength * mask)
        scores = xf.evaluate(tilted, base.tokenizer, tokens, evaluation(seed), base=split_model)
        points.append({"strength": strength, **scores.record()})
    return {"base": base.record(), "tokens": tokens.record(), "points": points}


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "trl" in options.arms and not find_spec("trl"):
        print('the arm trl is left out; it needs: pip install -e ".[rl]"')
        options.arms = [arm for arm in options.arms if arm != "trl"]
    for seed in options.seeds:
        for arm in options.arms:
            rates = options.rates if arm in ("tilt", "sequence") else options.few_rates if arm in FEW else [0.0]
            for rate in rates:
                file = RESULTS / f"{arm}-{rate:g}-seed{seed}.json"
                if file.exists() and not options.force:
                    continue
                started, record = time.perf_counter(), {"status": "ok"}
                try:
                    record |= run_arm(arm, rate, seed, options)
                except (xf.XFactorError, RuntimeError) as error:
                    record |= {"status": "failed", "error": str(error)}
                record |= {
                    "arm": arm,
                    "wanted": rate,
                    "seed": seed,
                    "wall": time.perf_counter() - started,
                    **where(options),
                }
                file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(f"{file.stem}: {record['status']}, {record['wall']:.0f} s", headline(record), flush=True)


def headline(record: dict) -> str:
    if "after" not in record:
        return ""
    after = record["after"]
    return f"R {after['rate']:.4f} mass {after['set_mass']:.4f} KL {after['kl_from_base']:.4f}"


def where(options: argparse.Namespace) -> dict:
    settings = {"model": options.model, "threads": options.threads, "sequence_steps": options.sequence_steps}
    return {"settings": settings, **provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--contains", default="X", help="the set: tokens that contain this, in any case")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=list(RATES))
    parser.add_argument("--few-rates", type=lambda text: [float(x) for x in text.split(",")], default=[0.1])
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--sequence-steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.what == "run":
        run(options)
    else:
        from rate_report import report

        report(RESULTS)


if __name__ == "__main__":
    main()
