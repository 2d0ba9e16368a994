"""The settings of the training loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import XFactorError
from .training.optimizers import OPTIMIZERS
from .training.sharding import check_sharding

METHODS = ("lora", "full")
DEFAULT_LR = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class TrainOptions:
    """The loop's settings; `lr=None` means `DEFAULT_LR[method]`.

    A step sums the gradients of `grad_accum` micro-batches of `batch_size` sequences each, divided by their number: the
    same step as one batch of all of them, in the memory of one. With `auto_batch`, a micro-batch that does not fit into
    memory is halved until it does; the step stays the same. With `fsdp`, several processes share out all weights
    (`sharding`).

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
    grad_accum: int = 1
    auto_batch: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise XFactorError(f"--method must be lora or full; got {self.method!r}")
        for name in ("steps", "batch_size", "seq_len", "grad_accum"):
            if getattr(self, name) < 1:
                raise XFactorError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise XFactorError(f"--lr must be greater than 0; got {self.lr:g}")
        if self.optimizer not in OPTIMIZERS:
            raise XFactorError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise XFactorError(f"--weight-decay must be at least 0; got {self.weight_decay:g}")
        if self.fsdp:
            check_sharding(self.method, self.optimizer)

    @property
    def learning_rate(self) -> float:
        return DEFAULT_LR[self.method] if self.lr is None else self.lr

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "lr": self.learning_rate}
