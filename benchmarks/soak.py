"""Memory over thousands of swaps and steps in one process: flat, or this exits with status 1.

    python benchmarks/soak.py --swaps 2000 --steps 5000 --json benchmarks/results/reliability/soak.json

Two adapters are swapped on a tiny random model, with a generation after every swap; one adapter is unloaded and loaded
again every tenth time. Then the model is trained. After a tenth of each part (warm-up) the resident set may grow by no
more than `--limit` MiB until its end.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import click
from bench import tiny
from bench.store import resident_mib

from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.options import LoraOptions, SamplingOptions, TrainOptions
from xfactor_peft.training.train import train


class Watch:
    """Resident memory, and objects alive, a hundred times over a part of the soak."""

    def __init__(self, count: int) -> None:
        self._count, self._started = count, time.perf_counter()
        self.samples: list[tuple[float, int]] = []

    def __call__(self, index: int) -> None:
        if index >= self._count // 10 and index % max(1, self._count // 100) == 0:
            gc.collect()
            self.samples.append((resident_mib(), len(gc.get_objects())))

    def result(self) -> dict[str, float]:
        memory, objects = zip(*self.samples, strict=True)
        return {
            "count": self._count,
            "after_warm_up_mib": round(memory[0], 1),
            "most_mib": round(max(memory), 1),
            "growth_mib": round(max(memory) - memory[0], 1),
            "objects_growth": objects[-1] - objects[0],
            "seconds": round(time.perf_counter() - self._started, 1),
        }


def swaps(model: str, root: Path, count: int) -> dict[str, float]:
    bank = AdapterBank(tiny.load(model)[0], root)
    for name in ("a", "b"):
        bank.load(name)
    watch = Watch(count)
    for index in range(count):
        name = "ab"[index % 2]
        if index % 10 == 9:
            bank.unload(name)
            bank.load(name)
        bank.use(name, 0.5 + index % 3 / 2)
        bank.generate("The fox", SamplingOptions(max_new_tokens=4, seed=index))
        watch(index)
    return watch.result()


def steps(model: str, count: int) -> dict[str, float]:
    watch, options = Watch(count), TrainOptions(steps=count, batch_size=2, seq_len=16)
    train(*tiny.load(model), options, LoraOptions(r=4), None, on_step=lambda step: watch(step.step))
    return watch.result()


@click.command(help=__doc__.split("\n")[0])
@click.option("--swaps", "swap_count", default=2000, show_default=True)
@click.option("--steps", "step_count", default=5000, show_default=True)
@click.option("--limit", default=8.0, show_default=True, help="MiB")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(swap_count: int, step_count: int, limit: float, file: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        model = tiny.make(Path(name) / "model")
        for adapter in "ab":
            tiny.make_adapter(model, Path(name) / adapter)
        result = {"swaps": swaps(model, Path(name), swap_count), "steps": steps(model, step_count)}
    flat = all(part["growth_mib"] <= limit for part in result.values())
    tiny.conclude(file, {"limit": limit}, result, ok=flat)


if __name__ == "__main__":
    main()
