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
    from .base.loading import LoadOptions as LoadOptions
    from .base.loading import load as load
    from .budget.options import MemoryOptions as MemoryOptions
    from .errors import XFactorError as XFactorError
    from .lora.wrap import LoraOptions as LoraOptions
    from .objective.kl import kl_loss as kl_loss
    from .objective.objectives import ObjectiveOptions as ObjectiveOptions
    from .objective.targets import Goal as Goal
    from .objective.targets import TiltedTarget as TiltedTarget
    from .objective.targets import UniformTarget as UniformTarget
    from .runs.run import train_to_folder as train_to_folder
    from .sampling.metrics import EvalOptions as EvalOptions
    from .sampling.metrics import evaluate as evaluate
    from .sampling_options import SamplingOptions as SamplingOptions
    from .tokens.token_set import TokenSet as TokenSet
    from .train_options import TrainOptions as TrainOptions
    from .training.train import train as train

__version__ = "0.1.0"

_HOME = {
    "AdapterBank": "bank.bank",
    "EvalOptions": "sampling.metrics",
    "Goal": "objective.targets",
    "LoadOptions": "base.loading",
    "LoraOptions": "lora.wrap",
    "Mix": "adapters.mix",
    "MemoryOptions": "budget.options",
    "ObjectiveOptions": "objective.objectives",
    "SamplingOptions": "sampling_options",
    "TiltedTarget": "objective.targets",
    "TokenSet": "tokens.token_set",
    "TrainOptions": "train_options",
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
