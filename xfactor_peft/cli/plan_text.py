"""A plan in words, before a run and against what was measured after it."""

from __future__ import annotations

from rich.table import Table

from ..budget.plan import Plan
from ..lowmem.memory import mib
from ..training.train import TrainResult
from .console import console
from .flags import as_flags

_PARTS = {
    "baseline": "Python and its libraries",
    "weights": "weights of the base",
    "trained": "trained weights, gradients, Adam",
    "saved": "activations saved for backward",
    "workspace": "workspace of training",
}


def print_plan(plan: Plan) -> None:
    """The parts of training's peak, the peaks of all phases, the verdict, and flags that would make it fit."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    trains = not plan.phases or "training" in {phase.name for phase in plan.phases}
    for name, label in _PARTS.items() if trains else ():
        if getattr(plan.memory, name):
            table.add_row(label, mib(getattr(plan.memory, name)))
    for phase in plan.phases or (plan.highest,):
        highest = phase.name == plan.highest.name
        table.add_row(f"peak: {phase.name}", mib(phase.total), style="bold" if highest else None)
    if plan.reclaimable:
        table.add_row("mapped weights and code beside it, which the system may take back", mib(plan.reclaimable))
    console.print(table)
    console.print(f"predicted peak {mib(plan.total)}, {plan.highest.name}", style="bold")
    if plan.recomputed:
        console.print(f"checkpointing: {plan.recomputed} of {plan.blocks} blocks are recomputed in backward")
    if plan.seconds is not None:
        console.print(f"predicted time: {plan.seconds:.3f} s/step")
    if plan.fits:
        console.print(f"it fits into {mib(plan.budget)}", style="green")
        return
    console.print(f"it does not fit into {mib(plan.budget)}", style="bold red")
    for settings, total in plan.advice:
        verdict = "would fit" if total <= plan.budget else "is the smallest, and does not fit either"
        console.print(f"  {as_flags(settings)}: about {mib(total)}, {verdict}")


def print_expectation(plan: Plan) -> None:
    """One line before a run."""
    pace = "" if plan.seconds is None else f", {plan.seconds:.3f} s/step"
    recomputed = f", {plan.recomputed} of {plan.blocks} blocks recomputed" if plan.recomputed else ""
    mapped = f" and {mib(plan.reclaimable)} that the system may take back" if plan.reclaimable else ""
    console.print(f"plan: about {mib(plan.total)} ({plan.highest.name}){mapped}{pace}{recomputed}")


def print_measured(result: TrainResult) -> None:
    """Peak memory by phase and time a step; predicted against measured where there was a plan."""
    phases = {
        "at load": result.base.load_peak,
        "in training": result.train_peak,
        "while sampling": result.sampling_peak,
    }
    text = ", ".join(f"{peak['rss_mib']:.0f} MiB {phase}" for phase, peak in phases.items())
    console.print(f"peak memory: {text}")
    if "cuda_mib" in result.train_peak:
        console.print(f"peak on the GPU: {result.train_peak['cuda_mib']:.0f} MiB")
    if result.plan is None:
        return
    unit = "cuda_mib" if "cuda_mib" in result.train_peak else "rss_mib"
    measured = max(peak[unit] for peak in (result.base.load_peak, result.train_peak, result.sampling_peak))
    console.print(_against("memory", (result.plan.total + result.plan.reclaimable) / 2**20, measured, "{:.0f} MiB"))
    if result.plan.seconds is not None and len(result.history) > 1:
        pace = sorted(step.seconds for step in result.history[1:])
        console.print(_against("time", result.plan.seconds, pace[len(pace) // 2], "{:.3f} s/step"))


def _against(what: str, predicted: float, measured: float, form: str) -> str:
    off = predicted / measured - 1
    return f"predicted {what} {form.format(predicted)}, measured {form.format(measured)} ({off:+.0%})"
