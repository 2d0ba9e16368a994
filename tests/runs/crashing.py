"""Runs that end in the middle, and what two runs must have in common to be the same."""

from __future__ import annotations

import json
import signal

from tests.training.uniform import QUICK, x_target
from xfactor_peft.options import LoraOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import FolderOptions, train_to_folder

OPTIONS = TrainOptions(steps=12, batch_size=2, seq_len=8, lr=1e-2)
FOLDER = {"force", "resume", "save_every", "settings"}
FILES = ("adapter_model.safetensors", "adapter_config.json")


class Crash(BaseException):
    """The process is gone: nothing catches this."""


def run(base, output, options=OPTIONS, crash_at=None, **more):
    def on_step(step):
        if step.step == crash_at:
            raise Crash

    folder = FolderOptions(**{"save_every": 5, **{k: more.pop(k) for k in FOLDER & more.keys()}})
    recipe = Recipe(options, evaluation=QUICK, **{"lora": LoraOptions(r=2), **more})
    return train_to_folder(base, x_target(base), output, recipe, folder, on_step=on_step)


def stop_at_the_second(measure):
    """`TrainingRun.measure`, which a signal stops when R is measured after training."""
    made = []

    def measured(self):
        made.append(self)
        if len(made) == 2:
            signal.raise_signal(signal.SIGTERM)
        return measure(self)

    return measured


def weights(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()} or {
        "model": (folder / "model.safetensors").read_bytes()
    }


def metrics(folder):
    """The lines of metrics.jsonl without the times, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def scores(folder):
    record = json.loads((folder / "xfactor.json").read_text())
    return [record[key] for key in ("before", "after", "loss", "train", "sha256")]
