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

_HOME = {
    "AdapterBank": "bank.bank",
    "EvalOptions": "options",
    "Goal": "objective.targets",
    "LoadOptions": "options",
    "LoraOptions": "options",
    "Mix": "adapters.mix",
    "MemoryOptions": "options",
    "ObjectiveOptions": "options",
    "Recipe": "options",
    "SamplingOptions": "options",
    "TiltedTarget": "objective.targets",
    "TokenSet": "tokens.token_set",
    "TokenSetTrainer": "training.trainer",
    "TrainOptions": "options",
    "UniformTarget": "objective.targets",
    "XFactorError": "errors",
    "evaluate": "sampling.metrics",
    "kl_loss": "objective.kl",
    "load": "base.loading",
    "train": "training.train",
    "train_to_folder": "runs.run",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import xfactor_peft` itself is instant."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
