"""Swap adapters at inference: one base in memory, any number of adapters on it."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ..adapters.adapter import AdapterInfo, find_adapter, read_adapter
from ..adapters.fit import check_fits
from ..adapters.mix import Mix
from ..base.loading import Base
from ..errors import XFactorError
from ..lora.wrap import remove_lora
from ..options import ChatOptions, SamplingOptions
from ..sampling.dial import scale_for_rate
from ..sampling.generation import generate, generate_batch
from ..tokens.rule import Rule
from ..tokens.token_set import TokenSet
from .adapter_layers import AdapterLayers
from .cache_guard import CacheGuard


class AdapterBank:
    """A base model with named adapters, of which none, one or a weighted mix is active.

        bank = AdapterBank(base)
        bank.load("demo-X")
        bank.use("demo-X", scale=0.5)
        bank.generate("Once upon a time")
        bank.use(Mix((("demo-X", 0.7), ("demo-Z", 0.3))))
        with bank.base_only():
            bank.generate("Once upon a time")

    Swapping changes which adapters count and nothing else: the logits after any sequence of swaps are bit-equal to
    those of a fresh load. Every adapter is checked against the base before any weight is touched, and a load that fails
    half-way is undone, so a failed `load` changes nothing. A KV cache made under other adapters is refused.

    Attributes:
        active: what counts now.
        adapters: what is loaded, by the name or folder it was loaded with.
        peft_names: PEFT's names of them, which may hold no dots; one is never used twice.
        in_use: for who shares a bank between threads: held while one computes; nothing here takes it.

    Raises:
        XFactorError: `base` carries LoRA layers already, e.g. because it was trained.
    """

    def __init__(self, base: Base, root: Path = Path("adapters")) -> None:
        if any(isinstance(module, LoraLayer) for module in base.model.modules()):
            raise XFactorError("this base carries an adapter already; load the base again for a bank of adapters")
        self.base = base
        self.root = root
        self.adapters: dict[str, AdapterInfo] = {}
        self.active = Mix()
        self.in_use = threading.Lock()
        self._state: Hashable = ()
        self._layers = AdapterLayers(base.model, str(base.device))
        self.peft_names: dict[str, str] = {}
        self._loads = 0
        self._guard = CacheGuard(base.model, lambda: self._state)

    @property
    def wrapped(self) -> PeftModel | None:
        """PEFT's wrapper round the base; None while no adapter is loaded."""
        return self._layers.peft

    @property
    def model(self) -> PreTrainedModel:
        """What generates: the base, or PEFT's wrapper, which passes on to the base whatever it lacks itself."""
        return cast(PreTrainedModel, self.wrapped or self.base.model)

    def load(self, reference: str) -> AdapterInfo:
        """Read, check and add an adapter, given by name or folder; what is active stays active.

        Raises:
            XFactorError: it is missing, damaged, or made for another base; nothing has changed then.
        """
        if reference in self.adapters:
            return self.adapters[reference]
        info = read_adapter(find_adapter(reference, self.root))
        check_fits(info, self.base)
        peft_name = f"adapter_{self._loads}"
        try:
            self._layers.add(info, peft_name)
        finally:
            self.use(self.active)
        self._loads += 1
        self.peft_names[reference], self.adapters[reference] = peft_name, info
        return info

    def unload(self, name: str) -> None:
        """Free an adapter; if it is part of what is active, the base is active afterwards.

        Raises:
            XFactorError: no such adapter is loaded.
        """
        self._check_loaded([name])
        if name in self.active.names:
            self.use(None)
        del self.adapters[name]
        self._layers.remove(self.peft_names.pop(name))
        self.use(self.active)

    def use(self, what: str | Mix | None, scale: float = 1.0) -> None:
        """Make one loaded adapter active at `scale` (1 = as trained, 0 = the base), a mix of several, or none.

        Raises:
            XFactorError: an adapter is not loaded, or a scale is not finite; what was active stays active.
        """
        mix = what.scaled(scale) if isinstance(what, Mix) else Mix.of(what, scale)
        self._check_loaded(mix.names)
        weights = {self.peft_names[name]: weight for name, weight in mix.parts if weight != 0}
        self._layers.activate(weights)
        self.active, self._state = mix, tuple(sorted(weights.items()))

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base alone, inside a `with` block."""
        before = self.active
        self.use(None)
        try:
            yield
        finally:
            self.use(before)

    @contextmanager
    def lent(self) -> Iterator[Base]:
        """The base as it was loaded, inside a `with` block, to train an adapter on; afterwards the bank is empty.

        What was trained is taken out again, so save it inside.
        """
        for name in list(self.adapters):
            self.unload(name)
        try:
            yield self.base
        finally:
            remove_lora(self.base.model)

    def generate(
        self, prompt: str, options: SamplingOptions = SamplingOptions(), chat: ChatOptions = ChatOptions()
    ) -> list[int]:
        """Ids that the active adapters (or the base) generate after the prompt, or in answer to it."""
        return generate(self.model, self.base.tokenizer, prompt, options, chat)

    def generate_batch(
        self,
        requests: Sequence[tuple[str, str | None]],
        options: SamplingOptions = SamplingOptions(),
    ) -> list[list[int]]:
        """Continue (prompt, adapter) requests in one batch, each under its own adapter as trained; None is the base.

        Every layer multiplies the base's weights once for the whole batch and adds each adapter to its rows. What is
        active before is active afterwards.

        Raises:
            XFactorError: an adapter is not loaded, or a prompt is too long.
        """
        names = [name for _, name in requests]
        self._check_loaded([name for name in names if name is not None])
        prompts = [prompt for prompt, _ in requests]
        if not any(names):
            with self.base_only():
                return generate_batch(self.model, self.base.tokenizer, prompts, options)
        before = self.active
        rows = ["__base__" if name is None else self.peft_names[name] for name in names]
        self._layers.activate({row: 1.0 for row in rows if row != "__base__"})
        self._state = ("rows", *rows)
        try:
            return generate_batch(self.model, self.base.tokenizer, prompts, options, adapter_names=rows)
        finally:
            self.use(before)

    def scale_for_rate(self, name: str, rate: float) -> float:
        """The scale at which a loaded adapter's samples hold `rate` of its set, from the dial measured in training.

        Raises:
            XFactorError: the adapter has no dial, or the rate is outside it.
        """
        return scale_for_rate(self.adapters[name].section("rate").get("dial") or (), rate, f"adapter {name}")

    def token_set(self, name: str) -> TokenSet | None:
        """The set an adapter was trained for, of several the first, made again from its rule.

        Raises:
            XFactorError: the rule gives another set than the one trained on.
        """
        info = self.adapters[name]
        return None if info.token_rule is None else self._made_again(name, info.section("tokens"))

    def token_sets(self, name: str) -> list[TokenSet]:
        """The sets of all goals of an adapter; raises XFactorError as `token_set` does."""
        return [self._made_again(name, record) for record in self.adapters[name].token_records]

    def _made_again(self, name: str, record: dict[str, Any]) -> TokenSet:
        """The set by its recorded rule, checked against its hash."""
        rule = Rule.from_record(record["rule"])
        tokens = TokenSet.from_rule(self.base.tokenizer, rule, vocab_size=self.base.vocab_size)
        if tokens.hash != record["hash"]:
            raise XFactorError(f"adapter {name}: its token rule gives another set than the one it was trained on")
        return tokens

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise XFactorError(f"adapter {name} is not loaded; loaded: {', '.join(self.adapters) or 'none'}")
