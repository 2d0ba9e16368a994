"""The phases of a run: one towards the uniform target, or solve, distil and perhaps sequence for a rate.

1. `Solve`: lambda from the base's own probabilities on the contexts, then from samples of the tilted base.
2. `Distil`: forward KL(q_lambda || model). A set head whose offset starts at lambda is the tilt already and learns
   nothing; attention and MLP alone have to learn it, and fall short on small models.
3. `Sequence` (`sequence.phase`): policies that plan whole texts, for `sequence_level`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..base.split_model import SplitModel
from ..checkpoint.state import Step, load_random
from ..errors import XFactorError
from ..lora.set_head import SetHead
from ..lora.variants import pissa_to_lora
from ..objective.objectives import TiltedObjective, UniformObjective
from ..objective.targets import UniformTarget
from ..objective.tilt import SUPPRESS, solve_rates
from ..progress import phase
from ..sampling.calibration import RateController, calibrate, calibrate_tilt
from ..sampling.contexts import context_pool
from ..sampling.own_samples import TEXTS, atom_masses
from ..sampling.reweighting import Estimate
from .loop import optimise, plateau
from .rate import CALIBRATION, DISTIL, SEQUENCE, SOLVED, RateRun
from .rate_head import fit_head, restore_head
from .run import TrainingRun
from .sequence.phase import Sequence
from .sharding import ShardedCopy

CONTEXTS = 64
"""Texts of the base in which lambda is solved first."""
EXACT = 2e-4
"""Nats; a tilt this close to its teacher has nothing left to learn."""
LEARNT = 0.05
"""Share of the first loss that is left, too, before blocks alone are the tilt: that of a rare set is below `EXACT`."""


class Phase(Protocol):
    """A part of a run, carried out once the ones before it are; each finds its own place in a resumed run."""

    def run(self) -> None:
        """Bring the run further, or pass when a resumed run is beyond this phase."""


def phases_of(run: TrainingRun) -> tuple[list[Phase], RateRun | None]:
    """What the run's target asks for, in order, and what these phases share in a run for a rate."""
    if isinstance(run.target, UniformTarget):
        return [Uniform(run, run.target)], None
    rate = RateRun(run, run.target)
    phases: list[Phase] = [Solve(rate), Distil(rate)]
    return [*phases, Sequence(rate)] if run.recipe.objective.sequence_level else phases, rate


class Uniform:
    """Forward KL from the uniform target, on LoRA adapters or on all weights."""

    def __init__(self, run: TrainingRun, target: UniformTarget) -> None:
        self._run, self._target = run, target

    def run(self) -> None:
        run, options = self._run, self._run.recipe.train
        if options.method == "lora":
            run.wrap()
        else:
            run.wrapped = run.base.model.requires_grad_(True)
        sharded = ShardedCopy(run.base.model) if options.fsdp else None
        trained = SplitModel(sharded.model) if sharded else run.split_model
        module = UniformObjective(trained, self._target, run.recipe.objective.kl_to_base, run.adapter_off)
        optimise(run, module, sharded=sharded)
        pissa_to_lora(run.model)


class Solve:
    """lambda (K,): given, or solved on contexts and corrected on samples of the tilted base. Then the adapter is made,
    and a set head, whose offset starts at lambda; or a head is fitted that looks (`rate_head`)."""

    def __init__(self, rate: RateRun) -> None:
        self._rate = rate

    def run(self) -> None:
        rate, run = self._rate, self._rate.run
        run.enter(CALIBRATION)
        if start := rate.start:
            state = start.state()
            rate.restore(start.facts["rate"], state)
            load_random(state["random"])
        elif not rate.looks:
            rate.strengths = self._solved()
        if not rate.looks:
            rate.enter(SOLVED)  # wrapping draws random numbers
        model = run.wrap(sets=len(rate.samples.members))
        if not run.lora.head:
            return
        rate.head = SetHead(model.get_output_embeddings(), rate.samples.members)
        if not rate.looks:
            rate.head.shift(rate.strengths)
            return
        if start:
            rate.fitted = restore_head(rate.head, start.facts["rate"]["head"])
        else:
            rate.fitted = fit_head(rate.head, rate.samples, rate.wanted, run.base_only, rate.drawn)
            rate.strengths = torch.tensor(rate.fitted.constant, dtype=torch.float64)
        rate.enter(SOLVED)

    def _solved(self) -> torch.Tensor:
        rate, target, samples = self._rate, self._rate.target, self._rate.samples
        if target.rates is None:
            return torch.tensor([goal.strength for goal in target.goals], dtype=torch.float64)
        options = rate.run.recipe.train
        if options.seq_len < 2:
            raise XFactorError("`seq_len` must be at least 2 for a rate")
        if not any(target.rates):
            return torch.full_like(rate.wanted, SUPPRESS)
        contexts = target.contexts(rate.run.recipe.objective)
        with phase("drawing contexts"):
            if contexts == "self" and samples.rate.cuts:
                masses = rate.uncut_masses(CONTEXTS)
            elif contexts == "self":
                masses = rate.tilted_texts(torch.zeros_like(rate.wanted), CONTEXTS, -1)[0].flatten(0, 1).double()
            else:
                pool = context_pool(rate.run.base, contexts, options.seq_len, seed=options.seed, count=128)
                masses = atom_masses(rate.run.split_model, pool, samples.atoms)
        first = solve_rates(masses, samples.atoms.patterns, target.rates)

        def measure(strengths: torch.Tensor, texts: int, index: int) -> Estimate:
            with phase(f"calibrating lambda, round {index + 1}"):
                return rate.tilted_texts(strengths, texts, index)[1]

        if samples.rate.cuts:  # what they cut has no weight under any tilt
            strengths, rounds = calibrate(lambda s, index: measure(s, TEXTS, index).rates, first, rate.wanted)
        else:
            strengths, rounds = calibrate_tilt(measure, rate.tilted, first, rate.wanted)
        rate.calibration = rounds
        return strengths * samples.rate.temperature


class Distil:
    """Forward KL from the tilted base, until nothing is left or it no longer falls.

    Without a set head the student lags behind its teacher, so at a third, a half and three quarters of the steps the
    teacher's lambda moves by the log-odds that the student's own samples lack.
    """

    def __init__(self, rate: RateRun) -> None:
        self._rate = rate

    def run(self) -> None:
        rate, run = self._rate, self._rate.run
        if run.hooks.checkpointer.start_phase == SEQUENCE:
            return
        if rate.looks:
            rate.stopped = "the set head is fitted: nothing is left to learn"
            return
        if rate.head is not None and run.recipe.objective.early_stop:
            rate.stopped = rate.stopped or "the set head is the tilt from the start: nothing is left to learn"
            return
        self._module = TiltedObjective(run.split_model, rate.target, run.base_only, rate.head)
        self._module.strengths.copy_(rate.strengths)
        rate.enter(DISTIL)
        optimise(run, self._module, stop=self._stop)
        if rate.head is not None:
            rate.head.write()

    def _stop(self, history: list[Step]) -> bool:
        rate, steps, loss = self._rate, self._rate.run.recipe.train.steps, history[-1].loss
        lags = rate.head is None and len(rate.wanted) > 0
        if lags and len(history) in (steps // 3, steps // 2, 3 * steps // 4):
            self._strengthen()
        if loss <= (EXACT if rate.head is not None else min(EXACT, LEARNT * history[0].loss)):
            rate.stopped = f"step {len(history)}: the adapter is the tilt (KL {loss:.1e})"
        elif rate.run.recipe.objective.early_stop and plateau([step.loss for step in history]):
            rate.stopped = f"step {len(history)}: the loss no longer falls"
        return rate.stopped is not None

    def _strengthen(self) -> None:
        rate = self._rate
        with phase("measuring R so far"):
            measured = rate.samples.rates()
        before = self._module.strengths.double().cpu()
        rate.calibration.append({"offset": before.tolist(), "rates": measured.tolist()})
        rate.strengths = RateController(rate.wanted, before, gain=1.0, proportional=0.0, limit=1.5).update(measured)
        self._module.strengths.copy_(rate.strengths)
        rate.enter(DISTIL)
