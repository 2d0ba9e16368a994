"""Kill a run with SIGKILL at random moments, go on each time, and compare the end with a run that was never killed.

    python benchmarks/kill_and_resume.py --kills 50 --json benchmarks/results/reliability/kill_and_resume.json

A tiny random model trains with LoRA dropout for `--steps` steps, with a checkpoint every `--save-every`. Each life of
the run is a process of its own, killed after a random time, checkpoints' writing, evaluation and publishing included;
when a run ends before enough kills were made, another begins, with another seed. Compared are the adapter's bytes, the
scores, and metrics.jsonl line by line but for the seconds. Exit status 1 when anything differs.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import torch
from bench import tiny

from xfactor_peft.adapters.files import SETTINGS
from xfactor_peft.adapters.output import staging_of
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.options import EvalOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.folder import METRICS
from xfactor_peft.runs.run import FolderOptions, train_to_folder

EVALUATION = EvalOptions(("The fox",), 2, SamplingOptions(max_new_tokens=16))
LEFT_BY_A_KILL = {"checkpoints", SETTINGS}  # one between publishing and tidying up


def live(model: str, output: Path, steps: int, save_every: int, seed: int) -> None:
    """One life of the run, in this process: its beginning, or whatever the last life left."""
    torch.set_num_threads(1)
    options = TrainOptions(steps=steps, batch_size=2, seq_len=16, lr=1e-2, seed=seed)
    places = staging_of(output), output  # the latter while only its scores are missing
    resume = any(all((place / name).is_file() for name in (SETTINGS, METRICS)) for place in places)
    recipe = Recipe(options, LoraOptions(r=4, dropout=0.2), EVALUATION)
    train_to_folder(*tiny.load(model), output, recipe, folder=FolderOptions(resume=resume, save_every=save_every))


def start(call, *arguments) -> int:
    """A call in a fork of this process, which has imported everything and run nothing; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        call(*arguments)
        status = 0
    except BaseException as error:
        print(f"a life ended with {type(error).__name__}: {error}", flush=True)
    os._exit(status)


def ended(child: int, within: float = 600) -> int | None:
    """The status of a child that ends within so many seconds; None when it has not."""
    until = time.perf_counter() + within
    while time.perf_counter() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def outcome(folder: Path) -> dict[str, object]:
    """What has to be the same, whatever happened on the way."""
    record = json.loads((folder / "xfactor.json").read_text())
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return {
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
        "config": (folder / "adapter_config.json").read_bytes(),
        "scores": [record[key] for key in ("before", "after", "loss", "train")],
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "files": {path.name for path in folder.iterdir()} - LEFT_BY_A_KILL,
    }


def complete(output: Path) -> bool:
    """Whether a run has nothing left to do: it is published with its scores."""
    return output.exists() and not (output / SETTINGS).exists()


def moment(output: Path) -> str:
    """Where a kill found the run."""
    staging = staging_of(output)
    if not (staging / METRICS).is_file():
        if output.exists():
            return "complete" if complete(output) else "published, not scored"
        return "before the first file"
    writing = any(staging.rglob("*.writing"))
    saved = Checkpoints(staging / "checkpoints").latest()
    return "while a file was written" if writing else "before a checkpoint" if saved is None else "after a checkpoint"


def kill_until_done(life: tuple, output: Path, most: int, moments: list[str], pause) -> bool:
    """Kill one run at most so many times; appends where each kill found it. False if a life failed."""
    killed = 0
    while not complete(output):
        child = start(live, *life)
        status = ended(child, pause() if killed < most else 600)
        if status is not None:
            return status == 0
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        moments.append(moment(output))
    return True


@click.command(help=__doc__.split("\n")[0])
@click.option("--kills", default=50, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--save-every", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(kills: int, steps: int, save_every: int, seed: int, file: Path | None) -> None:
    gc.freeze()  # what a fork shares with this process is no garbage
    dice, moments, lives, wrong = random.Random(seed), [], [], []
    with tempfile.TemporaryDirectory() as name:
        work, model = Path(name), str(Path(name) / "model")
        assert ended(start(tiny.make, work / "model")) == 0
        while len(moments) < kills:
            run, before, begun = len(lives), len(moments), time.perf_counter()
            whole, killed = work / f"whole-{run}", work / f"killed-{run}"
            assert ended(start(live, model, whole, steps, save_every, run)) == 0, "the run itself fails"
            length = time.perf_counter() - begun

            def pause(length: float = length) -> float:
                return dice.uniform(0.05, 1.05) * length

            life = model, killed, steps, save_every, run
            if not kill_until_done(life, killed, kills - before, moments, pause):
                wrong.append(f"run {run}: a life failed")
                break
            lives.append(len(moments) - before)
            expected, found = outcome(whole), outcome(killed)
            wrong += [f"run {run}: {key} differs" for key in expected if expected[key] != found[key]]
    settings = {"steps": steps, "save_every": save_every, "seed": seed}
    counts = {"kills": len(moments), "runs": len(lives), "kills_per_run": lives, "moments": dict(Counter(moments))}
    tiny.conclude(file, settings, {**counts, **settings, "differences": wrong}, ok=not wrong)


if __name__ == "__main__":
    main()
