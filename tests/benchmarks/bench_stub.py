"""A worker for the benchmark that trains nothing: it writes made-up figures at once, and fails where it is told to.

Environment: STUB_LOG takes a line a run; STUB_KILL, STUB_RAISE and STUB_EXIT are parts of file names whose runs kill
the process, fail, and end it; STUB_CHECK=bad fails a correctness check; STUB_WEIGHTS is the model's fingerprint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from bench.store import write
from bench.training.plan import Run

PROVENANCE = {
    "created": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {name: "1.0" for name in ("python", "torch", "transformers", "peft", "bitsandbytes")},
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "threads": 1, "gpu": None},
}


def model(name: str) -> dict:
    return {"name": name, "config": "c", "weights": os.environ.get("STUB_WEIGHTS", "w"), "tokenizer": "t"}


def checks(name: str) -> dict:
    error = 0.5 if os.environ.get("STUB_CHECK") == "bad" else 1e-7
    found = [{"name": "fused against eager", "error": error, "limit": 1e-5, "ok": error <= 1e-5}]
    return {"ok": error <= 1e-5, "checks": found, "model": model(name), **PROVENANCE}


def scores(rate: float) -> dict:
    low, high = max(0.0, rate - 0.02), min(1.0, rate + 0.02)
    return {
        "rate": rate, "interval": [low, high], "set_mass": rate, "kl_from_base": 5 * rate, "perplexity": 90.0,
        "kl_interval": [5 * low, 5 * high], "distinct_2": 0.5, "distinct_set_tokens": 5, "tokens": 64, "decoding": {},
    }  # fmt: skip


def figures(run: Run) -> dict:
    draw = random.Random(run.file)
    settings = run.settings
    if run.group == "sweep":
        tried = [{"lr": rate, "loss": abs(rate - 1e-2), "set_mass": 0.5} for rate in run.rates]
        return {"tried": tried, "lr": min(tried, key=lambda t: t["loss"])["lr"]}
    sample = {"prompt": "Once <upon>", "rate": 0.5, "tokens": 2, "decoding": {},
              "pieces": [[" XX", True], [" & <script>alert(1)</script>", False]]}  # fmt: skip
    text = {"scores": scores(0.9 + 0.02 * draw.random()), "held_out": {"before": 20.0, "after": 50.0, "ratio": 2.5}}
    if run.arm.method == "none":
        bias = [{"strength": s, **scores(0.1 * s)} for s in run.strengths]
        return {**text, "scores": scores(0.01), "floor": 0.25, "bias": bias, "samples": [sample]}
    loss = [8.0 / step + 0.01 * draw.random() for step in range(1, settings.steps + 1)]
    big = 1000.0 if run.arm.method == "full" else 400.0
    cost = {
        "loss": loss, "set_mass": loss, "seconds": [1.0] + [0.1 + 0.001 * draw.random() for _ in loss[1:]],
        "trainable_parameters": 1000, "file_bytes": 4000, "load_peak": {"rss_mib": 300.0},
        "train_peak": {"rss_mib": big},
    }  # fmt: skip
    return cost if run.group == "shape" else {**cost, **text, "probes": [[5, 0.5], [10, 0.95]], "samples": [sample]}


def record(run: Run) -> dict:
    head = {"status": "ok", "label": run.label, "spec": run.spec(), "model": model(run.model)}
    return {**head, **figures(run), "wall": 1.0, **PROVENANCE}


def main() -> None:
    order = json.load(sys.stdin)
    file, spec = Path(order["file"]), order["spec"]
    if file.name == "checks.json":
        write(file, checks(spec["model"]))
        return
    run, told = Run.of(spec), {key: os.environ.get(f"STUB_{key}") for key in ("KILL", "RAISE", "EXIT")}
    with Path(os.environ["STUB_LOG"]).open("a") as log:
        log.write(run.file + "\n")
    print(json.dumps([1, 8.0]), flush=True)
    if told["KILL"] and told["KILL"] in run.file:
        os.kill(os.getpid(), signal.SIGKILL)
    if told["EXIT"] and told["EXIT"] in run.file:
        sys.exit("no more bits")
    made = record(run)
    if told["RAISE"] and told["RAISE"] in run.file:
        made = {**made, "status": "failed", "error": "lost its way"}
    write(file, made)


if __name__ == "__main__":
    main()
