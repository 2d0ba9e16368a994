"""Is an adapter what it says? Hashes, fit, and self-tests on its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft.helpers import rescale_adapter_scale

from ..adapters.adapter import AdapterInfo, find_adapter, read_adapter
from ..adapters.fit import check_fits
from ..adapters.output import hashes
from ..base.loading import Base
from ..base.split_model import split
from ..errors import XFactorError
from ..options import DEFAULT_PROMPTS, EvalOptions, SamplingOptions
from ..phrases.evaluation import AFTER, Author, sampling_of
from ..phrases.rules import parse_rules
from ..sampling.metrics import evaluate
from ..tokens.automaton import TokenAutomaton
from .bank import AdapterBank
from .merging import merge

OK, FAILED, UNKNOWN = "ok", "failed", "not checked"


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, "ok", "failed" or "not checked", and why or with what figures."""

    name: str
    outcome: str
    detail: str = ""


def verify_files(reference: str, root: Path = Path("adapters")) -> tuple[AdapterInfo | None, list[Check]]:
    """The checks that need no model: the files can be read, and are those that were saved."""
    folder = find_adapter(reference, root)
    try:
        info = read_adapter(folder)
    except XFactorError as error:
        return None, [Check("files", FAILED, str(error))]
    checks = [Check("files", OK, f"{len(info.shapes)} tensors, all finite")]
    recorded = info.section("sha256")
    if not recorded:
        return info, [*checks, Check("sha256", UNKNOWN, "no hash was recorded when it was saved")]
    found = hashes(folder)
    changed = [name for name, value in recorded.items() if found.get(name) != value]
    if changed:
        return info, [*checks, Check("sha256", FAILED, f"{', '.join(changed)} changed since it was saved")]
    return info, [*checks, Check("sha256", OK, f"{len(recorded)} files as saved")]


def verify(reference: str, base: Base, root: Path = Path("adapters")) -> list[Check]:
    """Every check; `base` is consumed, because the last one merges the adapter into it.

    Beyond the files: it was made for this base; its rule gives the set that was trained on; at scale 0 the logits are
    the base's, bit for bit; the recorded R comes again with the recorded settings and seed, so that the 95 %
    intervals overlap; merged weights give the adapter's logits.

    Raises:
        XFactorError: there is no such adapter.
    """
    info, checks = verify_files(reference, root)
    if info is None:
        return checks
    try:
        check_fits(info, base)
        bank = AdapterBank(base, root)
        plain = _logits(bank)
        bank.load(reference)
    except XFactorError as error:
        return [*checks, Check("base", FAILED, str(error))]
    fits = OK if info.identity else UNKNOWN
    checks.append(Check("base", fits, str(info.identity or "shapes fit, but no fingerprint was recorded")))
    return [
        *checks,
        _check_tokens(bank, reference),
        _check_zero(bank, reference, plain),
        _check_rate(bank, reference),
        _check_merge(bank, reference),
    ]


def _check_tokens(bank: AdapterBank, name: str) -> Check:
    try:
        tokens = bank.token_set(name)
    except XFactorError as error:
        return Check("tokens", FAILED, str(error))
    if tokens is None:
        return Check("tokens", UNKNOWN, "no rule was recorded")
    return Check("tokens", OK, f"{tokens.describe()}, {len(tokens)} tokens")


def _check_zero(bank: AdapterBank, name: str, plain: torch.Tensor) -> Check:
    """Scale 0 inside PEFT's layers, not the bank's shortcut for it."""
    if bank.adapters[name].config.get("use_dora"):
        return Check("scale 0", UNKNOWN, "DoRA rescales the base's columns, also at scale 0")
    bank.use(name)
    with rescale_adapter_scale(bank.base.model, 0.0):
        difference = float((_logits(bank) - plain).abs().max())
    bank.use(None)
    return Check("scale 0", OK if difference == 0 else FAILED, f"logits differ from the base's by {difference:g}")


def _check_rate(bank: AdapterBank, name: str) -> Check:
    if bank.adapters[name].section("phrases"):
        return _check_phrases(bank, name)
    after = bank.adapters[name].section("after")
    if not after or bank.adapters[name].token_rule is None:
        return Check("R", UNKNOWN, "no R was recorded")
    decoding = dict(after["decoding"])
    count, repeats = decoding.pop("prompts"), decoding.pop("repeats")
    prompts = tuple(decoding.pop("prompt_texts", DEFAULT_PROMPTS if count == len(DEFAULT_PROMPTS) else ()))
    if not prompts:
        return Check("R", UNKNOWN, "its prompts were not recorded")
    options = EvalOptions(prompts, repeats, SamplingOptions(**decoding))
    try:
        tokens = bank.token_set(name)
    except XFactorError:
        return Check("R", UNKNOWN, "its token set is not known")
    assert tokens is not None  # it has a rule
    bank.use(name)
    scores = evaluate(split(bank.base.model), bank.base.tokenizer, tokens, options)
    bank.use(None)
    return _compared("R", (scores.rate, *scores.interval), (after["rate"], *after["interval"]))


def _check_phrases(bank: AdapterBank, name: str) -> Check:
    what, record = "in 1,000 words", bank.adapters[name].record
    after = record["phrases"]["after"]
    try:
        rules = parse_rules(record.get("rules"))
    except XFactorError:
        return Check(what, UNKNOWN, "the rules that it was made by were not recorded")
    if not after or not rules.held_out:
        return Check(what, UNKNOWN, "nothing was measured")
    automaton = TokenAutomaton(bank.base.tokenizer, rules.target.patterns, bank.base.vocab_size)
    bank.use(name)
    author, sampling = Author(bank.base, automaton, rules.chat), sampling_of(rules.options, AFTER)
    scores, _ = author.scored(rules.held_out, rules.options.eval_texts, sampling, bank.base_only)
    bank.use(None)
    return _compared(what, (scores.per_1000_words, *scores.interval), (after["per_1000_words"], *after["interval"]))


def _compared(what: str, found: tuple[float, ...], recorded: tuple[float, ...]) -> Check:
    """Two figures agree when their intervals overlap; (figure, low, high) each."""
    (rate, least, most), (told, low, high) = found, recorded
    detail = f"{rate:.4f} ({least:.4f} to {most:.4f}), recorded {told:.4f} ({low:.4f} to {high:.4f})"
    return Check(what, OK if low <= most and least <= high else FAILED, detail)


def _check_merge(bank: AdapterBank, name: str) -> Check:
    bank.use(name)
    adapted = _logits(bank)
    try:
        merge(bank, name)
    except XFactorError as error:
        return Check("merged", UNKNOWN, str(error))
    difference = float((_logits(bank) - adapted).abs().max())
    tolerance = (1e-4 if bank.base.dtype == "fp32" else 0.05) * max(1.0, float(adapted.abs().max()))
    return Check("merged", OK if difference <= tolerance else FAILED, f"logits differ by {difference:.2g}")


@torch.no_grad()
def _logits(bank: AdapterBank) -> torch.Tensor:
    ids = torch.arange(16, device=bank.base.device).remainder(bank.base.vocab_size)[None]
    return bank.base.model(input_ids=ids, use_cache=False).logits.float()
