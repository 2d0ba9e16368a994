"""One training run: what it works on, what it has made so far, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.loading import Base, load_base
from ..base.split_model import SplitModel, split
from ..base.vocabulary import Vocabulary
from ..budget.dry_run import Shape
from ..budget.memory_model import resident
from ..budget.out_of_memory import OUT_OF_MEMORY, explain, is_out_of_memory
from ..budget.phases import SAMPLING_BYTES
from ..budget.plan import limit_of, recompute_in
from ..checkpoint.checkpointer import NoCheckpoints
from ..checkpoint.state import Step
from ..errors import OutOfRoom, XFactorError
from ..lora.wrap import adapter_off, add_lora
from ..lowmem.activations import prepare_for_training
from ..lowmem.allocator import spare_heap
from ..lowmem.memory import peaks, reset_peak
from ..objective.targets import Target
from ..options import LoadOptions, LoraOptions, Recipe
from ..sampling.contexts import batches, check_length
from ..sampling.metrics import Evaluation, evaluate
from ..sampling.sampler import CACHE_BYTES
from .parallel import check_processes
from .sharding import check_shards


@dataclass(frozen=True)
class Hooks:
    """Who is told how a run goes.

    Attributes:
        on_step: called after every step, for progress and logs.
        checkpointer: saves the run as it goes, and resumes it from where it was saved.
    """

    on_step: Callable[[Step], None] = lambda _: None
    checkpointer: NoCheckpoints = field(default_factory=NoCheckpoints)


@dataclass
class TrainingRun:
    """A run under way; its phases read and change it.

    Attributes:
        recipe: with its LoRA options decided.
        split_model: the base as trunk and output embedding; LoRA is added inside it.
        shape: what decides the run's memory.
        recomputed: checkpointed blocks.
        wrapped: PEFT's wrapper round the base, or the base for full fine-tuning; None before a phase has made it.
        history: every step of every phase.
        highest: bytes of the phases' highest peak so far.
    """

    base: Base
    target: Target
    recipe: Recipe
    hooks: Hooks
    split_model: SplitModel
    shape: Shape
    recomputed: int
    wrapped: PeftModel | PreTrainedModel | None = None
    history: list[Step] = field(default_factory=list)
    highest: int = 0

    @classmethod
    def start(cls, base: Base, target: Target, recipe: Recipe, hooks: Hooks) -> TrainingRun:
        """Check everything, then make the base's activations small.

        Raises:
            XFactorError: options that do not go together, or a model that cannot be trained like this.
        """
        lora, train = recipe.lora, recipe.train
        assert lora is not None  # `train_recipe` decides it
        target.check(train, lora, recipe.objective)
        check_processes(train)
        if train.method == "full" and base.quantized:
            raise XFactorError("`method=full` cannot train a quantised model; load it without `quantization`")
        if train.fsdp:
            check_shards(base, target, recipe)
        check_length(base.model.config, train.seq_len)
        shape = run_shape(base, target, recipe, lora)
        recomputed = recompute_in(base, shape, recipe.memory)
        recomputed = hooks.checkpointer.recorded("recomputed", recomputed)
        prepare_for_training(base.model, recomputed)
        return cls(base, target, recipe, hooks, split(base.model), shape, recomputed)

    @property
    def lora(self) -> LoraOptions:
        assert self.recipe.lora is not None
        return self.recipe.lora

    @property
    def model(self) -> PeftModel | PreTrainedModel:
        """What is trained; there is none before the first phase has made it."""
        assert self.wrapped is not None
        return self.wrapped

    @property
    def adapter_off(self) -> Callable[[], AbstractContextManager] | None:
        """A context in which the model is the base; None where no base is left, or nothing was trained yet."""
        return self.base_only if isinstance(self.wrapped, PeftModel) else None

    def base_only(self) -> AbstractContextManager:
        """A context in which the adapter is off."""
        assert isinstance(self.wrapped, PeftModel)
        return adapter_off(self.wrapped)

    def cache_bytes(self) -> int:
        """What a budget, a packed file's promise, or the phases before leave the cache of a batch of samples now."""
        budget, mapped = limit_of(self.recipe.memory, self.shape.packed), self.shape.mapped
        if budget is None or self.base.device.type != "cpu":
            return CACHE_BYTES
        return max(budget, 0 if mapped else self.highest) - resident(mapped=mapped) - SAMPLING_BYTES

    def wrap(self, sets: int = 0) -> PeftModel:
        """Add LoRA to the base; `sets` is the rank of a set head."""
        self.wrapped = add_lora(self.base.model, self.lora, sets=sets)
        return self.wrapped

    def heap(self) -> AbstractContextManager:
        """The allocator's setting: the smaller, slower one where a packed file's promise has blocks recomputed."""
        tight = self.shape.packed and self.recipe.memory.checkpointing == "auto" and self.recomputed
        return spare_heap() if tight else nullcontext()

    def batches(self) -> Iterator[torch.Tensor]:
        """Endless batches of contexts, (B, T) ids."""
        train, contexts = self.recipe.train, self.target.contexts(self.recipe.objective)
        return batches(self.base, contexts, train.batch_size, train.seq_len, seed=train.seed)

    def enter(self, phase: str, **facts: Any) -> None:
        """Tell the checkpoints in which phase the run is from here on, and what they hold besides its state."""
        self.hooks.checkpointer.phase = phase
        self.hooks.checkpointer.facts.update(facts)

    def measure(self) -> tuple[Evaluation | None, dict[str, float]]:
        """(scores of the model as it is, peak memory of measuring them); no scores where none are asked for."""
        reset_peak(self.base.device)
        if self.recipe.evaluation is None:
            return None, peaks(self.base.device)
        goals = [goal.tokens for goal in self.target.goals] if len(self.target.goals) > 1 else []
        scores = evaluate(
            self.split_model, self.base.tokenizer, self.target.tokens, self.recipe.evaluation,
            base=self._base_again(), adapter_off=self.adapter_off, goals=goals,
        )  # fmt: skip
        return scores, self.peaks()

    def peaks(self) -> dict[str, float]:
        """The peak memory of a phase that ends now."""
        found = peaks(self.base.device)
        self.highest = max(self.highest, int(found["rss_mib"] * 2**20))
        return found

    def _base_again(self) -> SplitModel | None:
        """The base as it was, read again where all of its weights were trained: there is no adapter to switch off."""
        if self.wrapped is None or isinstance(self.wrapped, PeftModel):
            return None
        self.wrapped.zero_grad(set_to_none=True)
        options = LoadOptions(self.base.dtype, str(self.base.device))
        known = Vocabulary(self.base.tokenizer, self.base.vocab_size)
        return split(load_base(self.base.choice, options, known).model)

    @contextmanager
    def explaining_out_of_memory(self) -> Iterator[None]:
        """Inside, memory that runs out becomes an OutOfRoom that says what would have fitted."""
        try:
            yield
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            hint = self.hooks.checkpointer.resume_hint()
            reason = explain(self.base, self.shape, self.recipe.train.grad_accum, error=error, resume_hint=hint)
            raise OutOfRoom(reason) from None  # the traceback would hold on to the memory


def run_shape(base: Base, target: Target, recipe: Recipe, lora: LoraOptions) -> Shape:
    """What decides a run's memory, for `budget`."""
    train, sets = recipe.train, len(target.goals) if lora.head else 0
    return Shape(
        base.dtype, base.quantization, train.batch_size, train.seq_len, train.method, lora, sets,
        teacher=target.needs_teacher(recipe.objective),
        packed=base.choice.gguf.stat().st_size if base.choice.gguf else 0,
        mapped=base.mapped,
    )  # fmt: skip
