"""Kill a run with SIGKILL at random moments, go on each time, and compare the end with a run that was never killed.

    python benchmarks/kill_and_resume.py --kills 50 --json benchmarks/results/reliability/kill_and_resume.json

A tiny random model trains with LoRA dropout for `--steps` steps, with a checkpoint every `--save-every`. Each life of
the run is a process of its own, killed after a random time, checkpoints' writing, evaluation and publishing included;
when a run ends before enough kills were made, another begins, with another seed. Compared are the adapter's bytes, the
scores, and metrics.jsonl line by line but for the seconds. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.output import staging_of
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.checkpoint.checkpoints import Checkpoints
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.folder import METRICS, SETTINGS
from xfactor_peft.runs.run import FolderOptions, train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

EVALUATION = EvalOptions(("The fox",), 2, SamplingOptions(max_new_tokens=16))


def live(model: Path, output: Path, steps: int, save_every: int, seed: int) -> None:
    """One life of the run, in this process: its beginning, or whatever the last life left."""
    torch.set_num_threads(1)
    base = load_base(resolve_model(str(model)), LoadOptions("fp32"))
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    options = TrainOptions(steps=steps, batch_size=2, seq_len=16, lr=1e-2, seed=seed)
    resume = (staging_of(output) / SETTINGS).is_file() and (staging_of(output) / METRICS).is_file()
    train_to_folder(
        base,
        target,
        output,
        Recipe(options, LoraOptions(r=4, dropout=0.2), EVALUATION),
        folder=FolderOptions(resume=resume, save_every=save_every),
    )


def start(*arguments) -> int:
    """`live` in a fork of this process, which has imported everything and run nothing; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        live(*arguments)
        status = 0
    except BaseException as error:
        print(f"a life ended with {type(error).__name__}: {error}", flush=True)
    os._exit(status)


def ended(child: int, within: float) -> int | None:
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
        "files": sorted(path.name for path in folder.iterdir()),
    }


def moment(output: Path) -> str:
    """Where a kill found the run."""
    staging = staging_of(output)
    if not (staging / METRICS).is_file():
        return "published" if output.exists() else "before the first file"
    writing = any(staging.rglob("*.writing"))
    saved = Checkpoints(staging / "checkpoints").latest()
    return "while a file was written" if writing else "before a checkpoint" if saved is None else "after a checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dice, kills, moments, lives, runs, wrong = random.Random(options.seed), 0, Counter(), [], 0, []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = work / "model"
        if not os.fork():
            tiny_model_folder("gpt2", model)
            os._exit(0)
        os.wait()
        while kills < options.kills:
            settings = (options.steps, options.save_every, runs)
            begun = time.perf_counter()
            assert ended(start(model, work / f"whole-{runs}", *settings), 600) == 0, "the run itself fails"
            length = time.perf_counter() - begun
            output, killed = work / f"killed-{runs}", 0
            while True:
                child = start(model, output, *settings)
                last = kills >= options.kills
                status = ended(child, 600 if last else dice.uniform(0.05, 1.05) * length)
                if status == 0:
                    break
                if status is not None:
                    wrong.append(f"run {runs}: a life failed")
                    break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills, killed = kills + 1, killed + 1
                moments[moment(output)] += 1
                if output.exists():
                    break
            lives.append(killed)
            expected, found = outcome(work / f"whole-{runs}"), outcome(output)
            extra = {"checkpoints", SETTINGS}  # a kill between publishing and tidying up leaves these
            found["files"] = [file for file in found["files"] if file not in extra]
            wrong += [f"run {runs}: {key} differs" for key in expected if expected[key] != found[key]]
            runs += 1
    result = {
        "kills": kills, "runs": runs, "kills_per_run": lives, "moments": dict(moments), "steps": options.steps,
        "save_every": options.save_every, "seed": options.seed, "differences": wrong,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(result)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
