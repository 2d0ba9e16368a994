"""The sequence-level phase of a run for a rate: batches until nothing is gained, and the tilt again if nothing was."""

from __future__ import annotations

from ...checkpoint.state import Step
from ...progress import phase
from ..loop import plateau
from ..rate import SEQUENCE, RateRun, SequenceReport
from .state import SequenceState
from .trainer import SequenceOptions, SequenceStep, SequenceTrainer

CHECK_TEXTS = 128


class Sequence:
    """Improve the tilted policy in place; where nothing is gained in the end, the tilt comes back.

    Below a few set tokens a text the score function is all noise, and what it leaves behind costs KL. So the policy,
    its offset corrected, is compared with the one that the phase began with, on `CHECK_TEXTS` samples of each.
    """

    def __init__(self, rate: RateRun) -> None:
        self._rate = rate

    def run(self) -> None:
        rate, run = self._rate, self._rate.run
        objective, samples, checkpointer = run.recipe.objective, rate.samples, run.hooks.checkpointer
        trainer = self._trainer()
        self._report = rate.sequence = SequenceReport([])
        made, steps = self._report.steps, objective.sequence_steps
        state = SequenceState(trainer, run.history, made)
        run.model.eval()
        rate.enter(SEQUENCE)
        checkpointer.restore(state)
        with checkpointer.deferred():
            while len(made) < steps and not (objective.early_stop and self._stopped()):
                number = len(made)
                texts = samples.draw(samples.seed * 7 + 20_000 + number, trainer.options.sequences)
                step = trainer.update(texts, number, steps)
                made.append(step)
                run.history.append(Step(len(run.history), step.kl, step.rate, step.grad_norm, step.seconds))
                run.hooks.on_step(run.history[-1])
                checkpointer.after_step(state, last=len(made) == steps, every=1)
        self._keep_the_better(trainer, state)

    def _trainer(self) -> SequenceTrainer:
        rate, train, members = self._rate, self._rate.run.recipe.train, self._rate.samples.members
        price = rate.run.recipe.objective.outside_price
        options = SequenceOptions(lr=train.learning_rate, outside_price=price, seed=train.seed)
        return SequenceTrainer(
            rate.run.split_model, rate.head, members, rate.run.base_only, rate.wanted.to(members),
            rate.strengths.to(members), rate.samples.length, options,
        )  # fmt: skip

    def _stopped(self) -> bool:
        rate, made = self._rate, self._report.steps
        if reason := reason_to_stop(made, float(rate.wanted[0])):
            rate.stopped = f"batch {len(made)} of the sequence-level phase: {reason}"
        return reason is not None

    def _keep_the_better(self, trainer: SequenceTrainer, state: SequenceState) -> None:
        """Calibrate the trained policy's set head, then keep its weights or those of the tilt, whichever cost less."""
        rate, samples, report = self._rate, self._rate.samples, self._report
        if rate.head is not None:
            rate.correct_head()

        def price() -> tuple[float, float]:
            with phase("comparing with the tilt"):
                texts = samples.draw(samples.seed * 7 + 30_000, CHECK_TEXTS)
            return trainer.price(texts, rate.strengths.to(trainer.rates))

        weights, (report.kl, charge) = state.weights(), price()
        state.load_weights(state.before)
        report.kl_of_tilt, charge_of_tilt = price()
        report.kept = report.kl + charge < report.kl_of_tilt + charge_of_tilt
        if report.kept:
            state.load_weights(weights)
        else:
            charged = f" and {charge:.4f} for what it does outside of the set" if charge else ""
            costs = f"KL {report.kl:.4f}{charged}, the tilt's {report.kl_of_tilt:.4f}"
            rate.stopped = f"planning gained nothing ({costs}), so the tilt is kept"


def reason_to_stop(made: list[SequenceStep], rate: float) -> str | None:
    """KL at the wanted rate no longer falls, or texts drift apart; None to continue.

    KL is moved to the wanted rate along dKL/dR = lambda. Texts drift apart when the spread of R between them, over ten
    batches, is three times that of the first five: a mixture of full and empty texts is on its way.
    """
    if plateau([step.kl + step.strength * (rate - step.rate) for step in made], window=40, least=0.005):
        return "the KL at the wanted rate no longer falls"
    spreads = [step.spread for step in made]
    if len(spreads) >= 15 and sum(spreads[-10:]) / 10 > 3 * sum(spreads[:5]) / 5:
        return "the texts drift apart"
    return None
