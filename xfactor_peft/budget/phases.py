"""Peak memory of every phase of a run; the run's is the highest of them.

    load       held + what reading and quantising the largest layer takes
    sampling   held + kernels + key-value cache + states, logits and scores
    training   `memory_model.predict`
    planning   as training, on whole batches of sampled texts
    saving     held + kernels + 2 trained

`held` is the process's own and the weights. Every phase begins with what the ones before it leave: compiled kernels,
and from training on the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..base.hardware import DTYPES
from ..lowmem.kv_cache import token_bytes
from ..objective.kl import CHUNK_BYTES
from ..options import Recipe
from ..sampling.contexts import OPENING
from ..sampling.family_samples import ROUNDS, STATES
from ..sampling.metrics import POSITIONS
from ..sampling.own_samples import LENGTH, LONG, OPENINGS, TEXTS
from ..sampling.position_scores import SCORE_BYTES
from ..sampling.sampler import CACHE_BYTES, LEAST_BYTES
from .dry_run import Shape, StepMemory
from .memory_model import block_workspace, predict, runtime, scratch_bytes

SAMPLING_BYTES = 48 * 2**20
"""What sampling and scoring take beside the model and the cache: logits, states, activations, scores."""
PROMPT = 12
"""Tokens of the longest usual prompt; before there is a tokenizer nobody can count them."""
SCORE_CHUNKS = 4
"""Chunks of scored logits that are alive at once."""
DRAW_CHUNKS = 2.5
"""Chunks of drawn logits that are alive at once: in the model's dtype, in float32, and their sum or a set's masses."""
SEQUENCES = 64
"""Texts in a batch of the sequence-level phase."""


@dataclass(frozen=True)
class Course:
    """What a command does beside its steps.

    Attributes:
        texts, new: how many texts measure R before and after, and their tokens; 0 texts for no measurement.
        rate: openings, contexts and samples of a tilted base are drawn.
        steps: whether there are steps at all; a set head alone has nothing to learn.
        sequences: texts in a batch that is planned as a whole, 0 without that phase.
        dial: R is measured at several scales in the end.
    """

    texts: int = 0
    new: int = 0
    rate: bool = False
    steps: bool = True
    sequences: int = 0
    dial: bool = False

    @classmethod
    def of(cls, recipe: Recipe, *, rate: bool) -> Course:
        """The course of a recipe whose LoRA layers are decided."""
        evaluation, objective = recipe.evaluation, recipe.objective
        texts = len(evaluation.prompts) * evaluation.repeats if evaluation else 0
        head = rate and recipe.lora is not None and recipe.lora.head
        return cls(
            texts, evaluation.sampling.max_new_tokens if evaluation else 0, rate,
            not (head and objective.early_stop), SEQUENCES if objective.sequence_level else 0, rate and objective.dial,
        )  # fmt: skip

    def texts_shape(self, shape: Shape) -> Shape:
        """The shape of a batch of the sequence-level phase."""
        return replace(shape, batch=self.sequences, length=OPENING + LENGTH, teacher=True)


@dataclass(frozen=True)
class Phase:
    """A part of a run by name, and its peak in bytes."""

    name: str
    total: int


def predict_phases(
    config: PretrainedConfig, step: StepMemory, shape: Shape, course: Course, recomputed: int, *,
    baseline: int, limit: int | None, texts_step: StepMemory | None = None,
) -> tuple[Phase, ...]:  # fmt: skip
    """The phases in order.

    Args:
        limit: bytes of the whole process that the samples' key-value cache stays below; None for those of training.
        texts_step: `measure_step` on the batch of the sequence-level phase, where there is one.
    """
    held, kinds = baseline + step.weights, 0
    limit = limit or predict(step, shape, recomputed, baseline=baseline).total
    found = [Phase("load", held + step.largest)]

    def sampler(more: int = 0) -> _Sampler:
        most = max(limit, *(phase.total for phase in found))  # what was taken once may be taken again
        return _Sampler(config, step, shape, held + runtime(kinds) + more, most)

    if course.texts:
        kinds += 1
        found.append(Phase("R before", sampler().peak(course.texts, PROMPT + course.new)))
    if course.rate:
        kinds += 3  # openings, and whole texts of several lengths
        fit = 0 if course.steps else _fit_bytes(step.width)
        drawn = sampler(fit).peak(OPENINGS, OPENING), sampler(fit).peak(TEXTS, OPENING + LONG)
        found.append(Phase("calibration", max(drawn)))
    if course.steps:
        kinds += 1
        total = predict(step, shape, recomputed, baseline=baseline, kinds=kinds).total
        found.append(Phase("training", total))
    if texts_step is not None:
        kinds += 1
        whole = course.texts_shape(shape)
        total = predict(texts_step, whole, recomputed, baseline=baseline, kinds=kinds).total
        found.append(Phase("planning texts", total))
    trained = 4 * step.trainable if shape.method == "lora" else 0
    again = step.weights if shape.method == "full" else 0  # the base, read once more to compare with
    if course.texts:
        kinds += 1
        after = sampler(trained + again)
        found.append(Phase("R after", after.peak(course.texts, PROMPT + course.new, scored_twice=True)))
    if course.dial:
        found.append(Phase("dial", sampler(trained).peak(TEXTS // 3, OPENING + LENGTH)))
    found.append(Phase("saving", held + runtime(kinds) + 2 * trained))
    return tuple(found)


def _fit_bytes(width: int) -> int:
    """States that a set head is fitted in, bf16, and its moments: float64, their sum, one family's and a factor."""
    return ROUNDS * STATES * width * 2 + 3 * (width + 1) ** 2 * 8


@dataclass(frozen=True)
class _Sampler:
    """Peak of a process that holds `held` bytes and draws texts, their cache within `limit`."""

    config: PretrainedConfig
    step: StepMemory
    shape: Shape
    held: int
    limit: int

    def peak(self, texts: int, width: int, *, scored_twice: bool = False) -> int:
        row = token_bytes(self.config, DTYPES[self.shape.dtype]) * width
        held = self.held + (scratch_bytes(self.step, self.shape) if self.shape.packed else 0)  # it is there by then
        room = min(CACHE_BYTES, max(LEAST_BYTES, self.limit - held - SAMPLING_BYTES))
        rows = min(texts, max(1, room // row))
        return self.held + rows * row + self._workspace(rows, width, scored_twice)

    def _workspace(self, rows: int, width: int, scored_twice: bool) -> int:
        step, size = self.step, DTYPES[self.shape.dtype].itemsize
        states = rows * width * step.width * size
        drawn = DRAW_CHUNKS * min(CHUNK_BYTES, 4 * rows * step.vocab_size)
        scored = SCORE_CHUNKS * SCORE_BYTES
        small = replace(self.shape, batch=1, length=POSITIONS)
        block = block_workspace(step, small) if scored_twice else 0
        return int(states + drawn + scored + block) + scratch_bytes(step, small)
