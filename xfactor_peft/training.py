"""The training loop: random-token inputs, the KL objective, Adam, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .errors import XFactorError
from .head import SplitModel, split
from .loading import Base
from .lora import LoraOptions, add_lora, lora_b_norm, matched_modules, trainable_parameters
from .losses import KLResult, kl_loss
from .memory import peaks, reset_peak
from .metrics import EvalOptions, Evaluation, evaluate
from .targets import UniformTarget

METHODS = ("lora", "full")
DEFAULT_LR = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class TrainOptions:
    """The loop's settings; `lr=None` means `DEFAULT_LR[method]`.

    Raises:
        XFactorError: a value outside its range.
    """

    method: str = "lora"
    steps: int = 300
    batch_size: int = 4
    seq_len: int = 64
    lr: float | None = None
    optimizer: str = "adam"
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise XFactorError(f"--method must be lora or full; got {self.method!r}")
        for name in ("steps", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise XFactorError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise XFactorError(f"--lr must be greater than 0; got {self.lr:g}")
        if self.optimizer not in ("adam", "adamw"):
            raise XFactorError(f"--optimizer must be adam or adamw; got {self.optimizer!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise XFactorError(f"--weight-decay must be at least 0; got {self.weight_decay:g}")

    @property
    def learning_rate(self) -> float:
        return DEFAULT_LR[self.method] if self.lr is None else self.lr

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "lr": self.learning_rate}


@dataclass(frozen=True)
class Step:
    """One optimisation step: mean KL (nats), mass on S, gradient norm, seconds."""

    step: int
    loss: float
    set_mass: float
    grad_norm: float
    seconds: float


class Objective(nn.Module):
    """ids (B, T) -> mean D_KL(P || Q_model) over all B*T positions, as a module that accelerate can prepare."""

    def __init__(self, halves: SplitModel, target: UniformTarget) -> None:
        super().__init__()
        self.model = halves.model
        self._halves = halves
        device = halves.weight.device
        self.register_buffer("target", target.probabilities(device), persistent=False)
        self.register_buffer("mask", target.tokens.mask(device), persistent=False)

    def forward(self, ids: torch.Tensor) -> KLResult:
        halves = self._halves
        return kl_loss(halves.hidden(ids), halves.weight, self.target, self.mask, bias=halves.bias)


@dataclass
class TrainResult:
    """A trained model with everything that is worth writing down about how it came to be."""

    base: Base
    model: PeftModel | PreTrainedModel
    target: UniformTarget
    options: TrainOptions
    lora: LoraOptions | None
    before: Evaluation
    after: Evaluation
    history: list[Step]
    parameters: int
    modules: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    train_peak: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Everything but the weights, JSON-serialisable."""
        return {
            "base": self.base.record(),
            "tokens": self.target.tokens.record(),
            "target": {"kind": "uniform", "alpha": self.target.alpha, "beta": self.target.beta},
            "train": self.options.record(),
            "lora": asdict(self.lora) if self.lora else None,
            "loss": {"first": self.history[0].loss, "last": self.history[-1].loss},
            "before": self.before.record(),
            "after": self.after.record(),
            "trainable_parameters": self.parameters,
            "target_modules": self.modules,
            "seconds": round(self.seconds, 3),
            "load_peak": self.base.load_peak,
            "train_peak": self.train_peak,
        }


def train(
    base: Base,
    target: UniformTarget,
    options: TrainOptions = TrainOptions(),
    lora: LoraOptions = LoraOptions(),  # noqa: B008 (frozen)
    evaluation: EvalOptions = EvalOptions(),  # noqa: B008 (frozen)
    *,
    on_step: Callable[[Step], None] | None = None,
) -> TrainResult:
    """Train `base` in place towards `target`, and measure R before and after.

    Minimises mean_t D_KL(P || Q_model(. | x_<=t)) over batches x of uniformly random tokens (every
    position counts, inputs are not shifted), on LoRA adapters ("lora") or on all weights ("full").

    Args:
        base: a loaded model; it is changed (wrapped, or trained), so load a new one for another run.
        on_step: called after every step, for progress and logs.

    Raises:
        XFactorError: a quantised model with method "full", a sequence longer than the context, a loss that is
            not finite, or LoRA that did not move.
    """
    _check(base, options)
    torch.manual_seed(options.seed)
    halves = split(base.model)
    before = evaluate(halves, base.tokenizer, target.tokens, evaluation)
    modules = matched_modules(base.model, lora.target) if options.method == "lora" else {}
    model = add_lora(base.model, lora) if options.method == "lora" else base.model.requires_grad_(True)
    reset_peak(base.device)
    started = time.perf_counter()
    history = _loop(halves, model, target, base, options, on_step)
    seconds, train_peak = time.perf_counter() - started, peaks(base.device)
    if options.method == "lora" and lora_b_norm(model) == 0:
        raise XFactorError(
            f"LoRA's B is still 0 after {options.steps} steps: nothing was learnt; raise --lr or --steps"
        )
    adapter_off = model.disable_adapter if isinstance(model, PeftModel) else None
    after = evaluate(halves, base.tokenizer, target.tokens, evaluation, adapter_off=adapter_off)
    return TrainResult(
        base=base,
        model=model,
        target=target,
        options=options,
        lora=lora if options.method == "lora" else None,
        before=before,
        after=after,
        history=history,
        parameters=trainable_parameters(model),
        modules=modules,
        seconds=seconds,
        train_peak=train_peak,
    )


def _check(base: Base, options: TrainOptions) -> None:
    if options.method == "full" and base.quantized:
        raise XFactorError("--method full cannot train a quantised model; drop --load-in-8bit / --load-in-4bit")
    context = getattr(base.model.config, "max_position_embeddings", None)
    if context and options.seq_len > context:
        raise XFactorError(f"--seq-len {options.seq_len} is longer than the model's context of {context}")


def _loop(halves, model, target, base, options, on_step) -> list[Step]:
    full_bf16 = options.method == "full" and base.dtype == "bf16"
    accelerator = Accelerator(mixed_precision="bf16" if full_bf16 else "no", cpu=base.device.type == "cpu")
    trainable = [p for p in model.parameters() if p.requires_grad]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    optimizer = kind(trainable, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    objective, optimizer = accelerator.prepare(Objective(halves, target), optimizer)
    generator = torch.Generator().manual_seed(options.seed)
    vocabulary = min(len(base.tokenizer), base.vocab_size)
    history = []
    model.train()
    for step in range(options.steps):
        started = time.perf_counter()
        ids = torch.randint(vocabulary, (options.batch_size, options.seq_len), generator=generator)
        loss, mass = objective(ids.to(base.device))
        accelerator.backward(loss)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
        value = loss.item()
        _check_step(step, value, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(Step(step, value, mass.item(), norm, time.perf_counter() - started))
        if on_step:
            on_step(history[-1])
    model.eval()
    return history


def _check_step(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise XFactorError(f"step {step}: loss {loss:g}, gradient norm {norm:g}; lower --lr or use --dtype fp32")
    if norm == 0:
        raise XFactorError(f"step {step}: every gradient is 0, so nothing can be learnt; please report this model")
