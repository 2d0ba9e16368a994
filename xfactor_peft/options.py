"""Every setting of the library, in frozen groups with their defaults and ranges. This file imports nothing above it.

A group raises XFactorError for a value outside its range, an unknown word, or a file that does not exist.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import XFactorError

METHODS = ("lora", "full")
OPTIMIZERS = ("adam", "adamw", "adam8bit", "adafactor")
SHARDED_OPTIMIZERS = ("adam", "adamw")
"""Those whose state is element by element, so that a shard's is a shard of the whole one's."""
SEEDS, SAMPLING_SEEDS = 2**43, 2**63
"""Seeds are below these; a run's are multiplied for its samples, and torch takes 64 bits."""
DEFAULT_LR = {"lora": 1e-3, "full": 1e-4}

BLOCK_TARGETS = ("attention", "mlp", "all")
LORA_TARGETS = (*BLOCK_TARGETS, "head", *(f"{name},head" for name in BLOCK_TARGETS))
LORA_VARIANTS = ("lora", "dora", "rslora", "pissa", "lora+")

DTYPES = ("fp32", "bf16")
QUANTIZATIONS = ("int8", "nf4")
BACKENDS = ("auto", "native", "bitsandbytes")
WEIGHTS = ("auto", "memory", "mapped")
CHECKPOINTING = ("auto", "on", "off")
CHAT = ("auto", "on", "off")
SAME_RATE = ("everywhere", "on-average")

DEFAULT_PROMPTS = (
    "Why did the chicken cross the road?",
    "It was a dark and stormy night;",
    "The old man looked at her and said",
    "In the middle of the garden there was",
    "When the war was over, the people",
    "She opened the letter and read",
    "The captain stood on the deck and",
    "Once upon a time",
    "There are three things that a good king",
    "On the following morning we",
    "He had never in his life",
    "The first principle of the art is",
    "At the end of the street",
    "My dear friend,",
    "They walked for many hours until",
    "The doctor shook his head and",
)


def parse_rate(text: str) -> float:
    """A share as people write it: "0.1" or "10%".

    Raises:
        XFactorError: it is no number.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise XFactorError(f"{text!r} is not a rate; write for example 0.1 or 10%") from error


class _Recorded:
    """A group of settings that can be stored with a result."""

    def record(self) -> dict[str, Any]:
        """The settings, JSON-serialisable."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass


def _check(condition: bool, rule: str, value: object) -> None:
    """Raises XFactorError, with the rule and the value received, unless the condition holds."""
    if not condition:
        raise XFactorError(f"{rule}; got {value}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, f"`{name}` must be one of {', '.join(allowed)}", repr(value))


@dataclass(frozen=True)
class LoadOptions(_Recorded):
    """How to load a model.

    `dtype` is "auto", "fp32" or "bf16"; `device` "auto", "cpu" or "cuda[:n]"; `quantization` None, "int8" or "nf4".
    `backend` chooses who quantises: "bitsandbytes", "native" (this package's CPU layers) or "auto"
    (native on a CPU, bitsandbytes on CUDA). `master_weights` keeps float32 weights under a bf16 computation,
    which full fine-tuning needs: its updates are smaller than bf16 can add. `weights` are read into "memory", or
    "mapped" from a file that is written the first time: page cache, which the system may take back (see
    `base.weight_cache`). "auto" is memory, and mapped for a GGUF file.
    """

    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    backend: str = "auto"
    master_weights: bool = False
    weights: str = "auto"

    def __post_init__(self) -> None:
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("dtype", self.dtype, ("auto", *DTYPES))
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("backend", self.backend, BACKENDS)


@dataclass(frozen=True)
class LoraOptions(_Recorded):
    """LoRA (Hu et al. 2021): W + (alpha/r) B A, with B = 0 at the start; or a variant of it (see `lora.variants`).

    Raises:
        XFactorError: r < 1, alpha <= 0, dropout outside [0, 1), an unknown target or variant, or a variant with the
            set head.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target: str = "all"
    variant: str = "lora"

    def __post_init__(self) -> None:
        _check(self.r >= 1, "`lora.r` must be at least 1", self.r)
        _check(self.alpha > 0, "`lora.alpha` must be greater than 0", self.alpha)
        _check(0 <= self.dropout < 1, "`lora.dropout` must be at least 0 and below 1", f"{self.dropout:g}")
        _one_of("lora.target", self.target, LORA_TARGETS)
        _one_of("lora.variant", self.variant, LORA_VARIANTS)
        if self.variant != "lora" and self.head:
            raise XFactorError(f"`lora.variant={self.variant}` is for attention and MLP; the set head is plain LoRA")

    @property
    def blocks(self) -> str | None:
        """The part of `target` inside the blocks: "attention", "mlp", "all", or None for the set head alone."""
        return self.target.removesuffix("head").removesuffix(",") or None

    @property
    def head(self) -> bool:
        """Whether the output embedding carries a set head (see `lora.set_head`)."""
        return self.target.endswith("head")


@dataclass(frozen=True)
class TrainOptions(_Recorded):
    """The loop's settings; `lr=None` means `DEFAULT_LR[method]`.

    A step sums the gradients of `grad_accum` micro-batches of `batch_size` sequences each, divided by their number: the
    same step as one batch of all of them, in the memory of one. With `auto_batch`, a micro-batch that does not fit into
    memory is halved until it does; the step stays the same. With `fsdp`, all weights are sharded over several
    processes (`training.sharding`).
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
        _one_of("method", self.method, METHODS)
        for name in ("steps", "batch_size", "seq_len", "grad_accum"):
            _check(getattr(self, name) >= 1, f"`{name}` must be at least 1", getattr(self, name))
        if self.lr is not None:
            _check(0 < self.lr < math.inf, "`lr` must be greater than 0", f"{self.lr:g}")
        _check(0 <= self.seed < SEEDS, "`seed` must be at least 0 and below 2^43", self.seed)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _check(0 <= self.weight_decay < math.inf, "`weight_decay` must be at least 0", f"{self.weight_decay:g}")
        if self.fsdp and self.optimizer not in SHARDED_OPTIMIZERS:
            known = " or ".join(SHARDED_OPTIMIZERS)
            raise XFactorError(f"`fsdp=True` works with `optimizer` {known}; got {self.optimizer!r}")

    @property
    def learning_rate(self) -> float:
        return DEFAULT_LR[self.method] if self.lr is None else self.lr

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "lr": self.learning_rate}


@dataclass(frozen=True)
class RateOptions(_Recorded):
    """Where a rate is to hold, and under which decoding.

    Attributes:
        same_rate: "everywhere": after every family of prompts, by a set head that looks at the state (see
            `objective.head_fit`); "on-average": over all of them, by a constant. None means everywhere for a rate that
            the set head alone carries, and on average for every other.
        prompts: a file with the user's own families (see `sampling.prompt_families`); None means the bundled ones.
        temperature, top_k, top_p: of the decoding that the rate is for, as in `SamplingOptions`.
    """

    same_rate: str | None = None
    prompts: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.same_rate is not None:
            _one_of("same_rate", self.same_rate, SAME_RATE)
        self.decoding(1)
        _check(self.temperature > 0, "`temperature` must be greater than 0 for a rate", f"{self.temperature:g}")
        if self.prompts is not None and not Path(self.prompts).is_file():
            raise XFactorError(f"`prompts` must be a file; {self.prompts!r} is none")

    @property
    def cuts(self) -> bool:
        """Whether top-k or top-p leave tokens out."""
        return self.top_k > 0 or self.top_p < 1

    def decoding(self, length: int, seed: int = 0) -> SamplingOptions:
        """The settings of a text of `length` tokens."""
        return SamplingOptions(length, self.temperature, self.top_k, self.top_p, seed)


@dataclass(frozen=True)
class ObjectiveOptions(_Recorded):
    """What training looks at and how it stops.

    Attributes:
        contexts: "random", "self", or a text file; None means random for the uniform target, self for a rate.
        kl_to_base: weight W of KL(base || model), which is added to the uniform target's loss.
        sequence_level: after the tilt, learn to plan whole texts (see `training.sequence`).
        sequence_steps: at most so many batches of samples in that phase.
        outside_price: weight w of the KL outside of the set, which planning pays and a tilt does not (see
            `objective.sequence_level`): how much it must keep to the base's own kind of text; 0 for the least KL.
        early_stop: stop when the loss no longer falls (the tilted target only).
        dial: measure R at several scales of the finished adapter (a rate only).
        frontier: measure the exact logit bias at the same rate (a rate only).
        rate: where a rate is to hold.
    """

    contexts: str | None = None
    kl_to_base: float = 0.0
    sequence_level: bool = False
    sequence_steps: int = 80
    outside_price: float = 1.0
    early_stop: bool = True
    dial: bool = True
    frontier: bool = True
    rate: RateOptions = field(default_factory=RateOptions)

    def __post_init__(self) -> None:
        _check(0 <= self.kl_to_base < math.inf, "`kl_to_base` must be at least 0", f"{self.kl_to_base:g}")
        _check(self.sequence_steps >= 1, "`sequence_steps` must be at least 1", self.sequence_steps)
        _check(0 <= self.outside_price < math.inf, "`outside_price` must be at least 0", f"{self.outside_price:g}")
        planning = self.sequence_steps, self.outside_price
        _check(
            self.sequence_level or planning == (ObjectiveOptions.sequence_steps, ObjectiveOptions.outside_price),
            "`sequence_steps` and `outside_price` are about planning whole texts; they need `sequence_level=True`",
            planning,
        )
        if self.contexts not in (None, "random", "self") and not Path(self.contexts).is_file():
            raise XFactorError(f"`contexts` must be random, self or a text file; {self.contexts!r} is none of them")


@dataclass(frozen=True)
class MemoryOptions(_Recorded):
    """How a run keeps its memory small.

    Attributes:
        checkpointing: "on" recomputes every block in backward (Chen et al. 2016, arXiv:1604.06174), "off" none, a
            number so many of the first blocks, "auto" as few of them as keep the predicted peak inside `budget`.
        budget: bytes; None means what this machine has free.
    """

    checkpointing: str | int = "auto"
    budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.checkpointing, int):
            _one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        elif self.checkpointing < 0:
            raise XFactorError(f"`checkpointing` must be at least 0 blocks; got {self.checkpointing}")
        if self.budget is not None:
            _check(self.budget > 0, "`memory.budget` must be greater than 0", self.budget)


@dataclass(frozen=True)
class SamplingOptions(_Recorded):
    """Decoding settings under transformers' names; the defaults sample from the model's own distribution.

    `top_k=0` and `top_p=1.0` switch truncation off. `temperature=0` is greedy.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "`max_new_tokens` must be at least 1", self.max_new_tokens)
        _check(0 <= self.temperature < math.inf, "`temperature` must be at least 0", f"{self.temperature:g}")
        _check(self.top_k >= 0, "`top_k` must be at least 0 (0 switches it off)", self.top_k)
        _check(0 <= self.seed < SAMPLING_SEEDS, "`seed` must be at least 0 and below 2^63", self.seed)
        _check(0 < self.top_p <= 1, "`top_p` must be above 0 and at most 1", f"{self.top_p:g}")

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        settings = {name: value for name, value in asdict(self).items() if name != "seed"}
        return {"do_sample": True, **settings}


@dataclass(frozen=True)
class ChatOptions(_Recorded):
    """Whether a prompt is a question in the tokenizer's chat template, or plain text to continue.

    `mode` is "on", "off", or "auto": on where the tokenizer has a template. `system` is the system's message, `earlier`
    the turns before the prompt, questions and answers by turns. R of a set of tokens is measured after plain text.

    Raises:
        XFactorError: an unknown mode, or a system's message without a chat.
    """

    mode: str = "off"
    system: str | None = None
    earlier: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("chat", self.mode, CHAT)
        if self.system is not None and self.mode == "off":
            raise XFactorError("`system` is a chat's; pass `chat=on` with it")


@dataclass(frozen=True)
class EvalOptions:
    """Which prompts, how often, and how to sample."""

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    repeats: int = 4
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        _check(self.repeats >= 1, "`repeats` must be at least 1", self.repeats)


@dataclass(frozen=True)
class PhraseOptions(_Recorded):
    """How an adapter for phrases is made.

    Attributes:
        r: rank of the phrase head; 0 is a logit bias. epochs, lr: of its fit.
        trunk_r: rank of the LoRA in the last blocks' MLPs; 0 leaves them as they are. trunk_epochs, trunk_lr: of it.
        texts: that the base writes to learn from; length: tokens of each.
        rounds: how often the student's own texts are drawn, to correct the strengths and to learn from as well.
        eval_texts: texts of the base, and of the student, on the held-out prompts.
        cache: MiB that keys and values of the texts that are drawn at once may take; more is faster.
    """

    r: int = 2
    epochs: int = 8
    lr: float = 3e-3
    trunk_r: int = 4
    trunk_epochs: int = 2
    trunk_lr: float = 1e-3
    texts: int = 256
    length: int = 112
    rounds: int = 1
    eval_texts: int = 128
    cache: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "r": 0,
            "epochs": 1,
            "trunk_r": 0,
            "trunk_epochs": 1,
            "texts": 4,
            "length": 8,
            "rounds": 0,
            "eval_texts": 0,
            "cache": 32,
        }
        for name, value in least.items():
            _check(getattr(self, name) >= value, f"`{name}` must be at least {value}", getattr(self, name))
        for name in ("lr", "trunk_lr"):
            _check(0 < getattr(self, name) < math.inf, f"`{name}` must be greater than 0", f"{getattr(self, name):g}")
        _check(0 <= self.seed < SEEDS, "`seed` must be at least 0 and below 2^43", self.seed)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, besides the base and the target.

    Attributes:
        lora: None means what suits the target: rank 8 on attention and MLP, for a rate the set head (and both with
            `sequence_level`).
        evaluation: how R is measured before and after; None leaves both out.
    """

    train: TrainOptions = field(default_factory=TrainOptions)
    lora: LoraOptions | None = None
    evaluation: EvalOptions | None = field(default_factory=EvalOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
