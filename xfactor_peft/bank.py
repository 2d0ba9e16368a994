"""Swap adapters at inference: one base in memory, any number of adapters on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from .adapters import AdapterInfo, check_fits, find_adapter, read_adapter
from .dial import scale_for_rate
from .errors import XFactorError
from .generation import SamplingOptions, generate
from .loading import Base
from .tokens import TokenSet


class AdapterBank:
    """A base model with named adapters, of which one or none is active.

        bank = AdapterBank(base)
        bank.load("demo-X")
        bank.use("demo-X", scale=0.5)
        bank.generate("Once upon a time")

    Every adapter is checked against the base before any weight is touched, so a failed `load` changes nothing.
    """

    def __init__(self, base: Base, root: Path = Path("adapters")) -> None:
        self.base = base
        self.root = root
        self.adapters: dict[str, AdapterInfo] = {}
        self.active: str | None = None
        self.scale = 1.0
        self._peft: PeftModel | None = None
        self._keys: dict[str, str] = {}  # PEFT's module names may hold no dots, ours may

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        return self._peft if self._peft is not None else self.base.model

    def load(self, reference: str) -> AdapterInfo:
        """Read, check and add an adapter, given by name or folder; the active one stays active.

        Raises:
            XFactorError: it is missing, damaged, or made for another base; nothing has changed then.
        """
        info = read_adapter(find_adapter(reference, self.root))
        if reference in self.adapters:
            return self.adapters[reference]
        check_fits(info, self.base)
        key = f"adapter_{len(self._keys)}"
        device = str(self.base.device)
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.base.model, info.folder, adapter_name=key, torch_device=device)
        else:
            self._peft.load_adapter(info.folder, adapter_name=key, torch_device=device)
        self._peft.eval()
        self._keys[reference], self.adapters[reference] = key, info
        self.use(self.active, self.scale)
        return info

    def use(self, name: str | None, scale: float = 1.0) -> None:
        """Make one loaded adapter active at `scale` (1 = as trained, 0 = the base), or none of them.

        Raises:
            XFactorError: no such adapter is loaded, or the scale is not finite.
        """
        if name is not None and name not in self.adapters:
            raise XFactorError(f"adapter {name} is not loaded; loaded: {', '.join(self.adapters) or 'none'}")
        if not abs(scale) < float("inf"):
            raise XFactorError(f"the scale must be a finite number; got {scale}")
        if self._peft is not None:
            if name is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(self._keys[name], inference_mode=True)
                for module in self._peft.modules():
                    if isinstance(module, LoraLayer) and self._keys[name] in module.scaling:
                        module.set_scale(self._keys[name], scale)
        self.active, self.scale = name, scale

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, inside a `with` block."""
        name, scale = self.active, self.scale
        self.use(None)
        try:
            yield
        finally:
            self.use(name, scale)

    def generate(self, prompt: str, options: SamplingOptions = SamplingOptions()) -> list[int]:  # noqa: B008
        """Ids that the active adapter (or the base) generates after the prompt."""
        return generate(self.model, self.base.tokenizer, prompt, options)

    def scale_for_rate(self, name: str, rate: float) -> float:
        """The scale at which a loaded adapter's samples hold `rate` of its set, from the dial measured in training.

        Raises:
            XFactorError: the adapter has no dial, or the rate is outside it.
        """
        return scale_for_rate((self.adapters[name].record.get("rate") or {}).get("dial", ()), rate, f"adapter {name}")

    def token_set(self, name: str) -> TokenSet | None:
        """The set an adapter was trained for, made again from its rule and checked against its hash.

        Raises:
            XFactorError: the rule gives another set than the one trained on.
        """
        info = self.adapters[name]
        if info.token_rule is None:
            return None
        tokens = TokenSet.from_rule(self.base.tokenizer, info.token_rule, vocab_size=self.base.vocab_size)
        if tokens.hash != info.record["tokens"]["hash"]:
            raise XFactorError(f"adapter {name}: its token rule gives another set than the one it was trained on")
        return tokens
