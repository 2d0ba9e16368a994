"""A tiny random model with adapters, and records, for the scripts that try the package's reliability on one."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from . import store

sys.path.insert(0, str(store.REPOSITORY))  # the model is that of the tests

from tests.tiny import tiny_model_folder
from xfactor_peft.base.loading import Base, load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import LoadOptions, LoraOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet


def make(folder: Path) -> str:
    """Write the model; returns its name for `load`."""
    warnings.simplefilter("ignore")
    return str(tiny_model_folder("gpt2", folder))


def load(model: str) -> tuple[Base, UniformTarget]:
    """The model, and tokens with "X" to train it on."""
    base = load_base(resolve_model(model), LoadOptions("fp32"))
    return base, UniformTarget(TokenSet.contains(base.tokenizer, "X"))


def make_adapter(model: str, folder: Path) -> None:
    train_to_folder(*load(model), folder, Recipe(TrainOptions(steps=2, seq_len=8), LoraOptions(r=4), None))


def conclude(file: Path | None, settings: dict[str, Any], figures: dict[str, Any], *, ok: bool, hide=()) -> None:
    """Write a script's record to `file`, if there is one, print its figures, and exit: with status 1 unless `ok`."""
    if file:
        store.write(file, {"status": "ok" if ok else "failed", **figures, "settings": settings, **store.provenance()})
    print({key: value for key, value in figures.items() if key not in hide})
    sys.exit(int(not ok))
