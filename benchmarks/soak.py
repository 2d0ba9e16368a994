"""Memory over thousands of swaps and steps in one process: flat, or this exits with status 1.

    python benchmarks/soak.py --swaps 2000 --steps 5000 --json benchmarks/results/reliability/soak.json

Two adapters are swapped on a tiny random model, with a generation after every swap; one adapter is unloaded and loaded
again every tenth time. Then the model is trained. After a tenth of each part (warm-up) the resident set may grow by no
more than `--limit` MiB until its end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import tiny_model_folder
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.train import train

EVALUATION = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=4))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Resident memory, and objects alive, a hundred times over a part of the soak."""

    def __init__(self, count: int) -> None:
        self._every, self._warm_up = max(1, count // 100), count // 10
        self.samples: list[float] = []
        self.objects: list[int] = []

    def __call__(self, index: int) -> None:
        if index >= self._warm_up and index % self._every == 0:
            gc.collect()
            self.samples.append(resident_mib())
            self.objects.append(len(gc.get_objects()))

    def result(self, seconds: float) -> dict[str, float]:
        return {
            "after_warm_up_mib": round(self.samples[0], 1),
            "most_mib": round(max(self.samples), 1),
            "growth_mib": round(max(self.samples) - self.samples[0], 1),
            "objects_growth": self.objects[-1] - self.objects[0],
            "seconds": round(seconds, 1),
        }


def swaps(model: str, root: Path, count: int) -> dict[str, float]:
    bank = AdapterBank(load_base(resolve_model(model), LoadOptions("fp32")), root)
    for name in ("a", "b"):
        bank.load(name)
    watch, started = Watch(count), time.perf_counter()
    for index in range(count):
        name = "ab"[index % 2]
        if index % 10 == 9:
            bank.unload(name)
            bank.load(name)
        bank.use(name, 0.5 + index % 3 / 2)
        bank.generate("The fox", SamplingOptions(max_new_tokens=4, seed=index))
        watch(index)
    return watch.result(time.perf_counter() - started)


def steps(model: str, count: int) -> dict[str, float]:
    base = load_base(resolve_model(model), LoadOptions("fp32"))
    target, watch, started = UniformTarget(TokenSet.contains(base.tokenizer, "X")), Watch(count), time.perf_counter()
    options = TrainOptions(steps=count, batch_size=2, seq_len=16)
    train(base, target, options, LoraOptions(r=4), EVALUATION, on_step=lambda step: watch(step.step))
    return watch.result(time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--swaps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=8.0, help="MiB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        model = str(tiny_model_folder("gpt2", Path(name) / "model"))
        for adapter in "ab":
            base = load_base(resolve_model(model), LoadOptions("fp32"))
            target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
            short = TrainOptions(steps=2, seq_len=8)
            train_to_folder(base, target, Path(name) / adapter, Recipe(short, LoraOptions(r=4), EVALUATION))
        result = {
            "swaps": {"count": options.swaps, **swaps(model, Path(name), options.swaps)},
            "steps": {"count": options.steps, **steps(model, options.steps)},
        }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(result)
    return int(any(part["growth_mib"] > options.limit for part in result.values()))


if __name__ == "__main__":
    sys.exit(main())
