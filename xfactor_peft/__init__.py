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
    from .bank import AdapterBank as AdapterBank
    from .budget.options import MemoryOptions as MemoryOptions
    from .errors import XFactorError as XFactorError
    from .loading import LoadOptions as LoadOptions
    from .loading import load as load
    from .lora import LoraOptions as LoraOptions
    from .losses import kl_loss as kl_loss
    from .metrics import EvalOptions as EvalOptions
    from .metrics import evaluate as evaluate
    from .mixing import Mix as Mix
    from .objectives import ObjectiveOptions as ObjectiveOptions
    from .runs import train_to_folder as train_to_folder
    from .sampling_options import SamplingOptions as SamplingOptions
    from .targets import Goal as Goal
    from .targets import TiltedTarget as TiltedTarget
    from .targets import UniformTarget as UniformTarget
    from .tokens import TokenSet as TokenSet
    from .train_options import TrainOptions as TrainOptions
    from .training import train as train

__version__ = "0.1.0"

_HOME = {
    "AdapterBank": "bank",
    "EvalOptions": "metrics",
    "Goal": "targets",
    "LoadOptions": "loading",
    "LoraOptions": "lora",
    "Mix": "mixing",
    "MemoryOptions": "budget.options",
    "ObjectiveOptions": "objectives",
    "SamplingOptions": "sampling_options",
    "TiltedTarget": "targets",
    "TokenSet": "tokens",
    "TrainOptions": "train_options",
    "UniformTarget": "targets",
    "XFactorError": "errors",
    "evaluate": "metrics",
    "kl_loss": "losses",
    "load": "loading",
    "train": "training",
    "train_to_folder": "runs",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import xfactor_peft` itself is instant."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
