"""Teach a causal language model to prefer, or avoid, chosen tokens.

import xfactor_peft as xf

base = xf.load()
tokens = xf.TokenSet.contains(base.tokenizer, "X")
result = xf.train(base, xf.UniformTarget(tokens))
print(result.before.rate, result.after.rate)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.mix import Mix as Mix
    from .bank.bank import AdapterBank as AdapterBank
    from .base.loading import load as load
    from .errors import XFactorError as XFactorError
    from .objective.kl import kl_loss as kl_loss
    from .objective.targets import Goal as Goal
    from .objective.targets import TiltedTarget as TiltedTarget
    from .objective.targets import UniformTarget as UniformTarget
    from .options import EvalOptions as EvalOptions
    from .options import LoadOptions as LoadOptions
    from .options import LoraOptions as LoraOptions
    from .options import MemoryOptions as MemoryOptions
    from .options import ObjectiveOptions as ObjectiveOptions
    from .options import Recipe as Recipe
    from .options import SamplingOptions as SamplingOptions
    from .options import TrainOptions as TrainOptions
    from .runs.run import train_to_folder as train_to_folder
    from .sampling.metrics import evaluate as evaluate
    from .tokens.token_set import TokenSet as TokenSet
    from .training.train import train as train
    from .training.trainer import TokenSetTrainer as TokenSetTrainer

__version__ = "0.1.0"

_NAMES = {
    "adapters.mix": "Mix",
    "bank.bank": "AdapterBank",
    "base.loading": "load",
    "errors": "XFactorError",
    "objective.kl": "kl_loss",
    "objective.targets": "Goal TiltedTarget UniformTarget",
    "options": "EvalOptions LoadOptions LoraOptions MemoryOptions ObjectiveOptions Recipe SamplingOptions TrainOptions",
    "runs.run": "train_to_folder",
    "sampling.metrics": "evaluate",
    "tokens.token_set": "TokenSet",
    "training.train": "train",
    "training.trainer": "TokenSetTrainer",
}
"""Modules, and what is public of them."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import xfactor_peft` itself is instant."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
