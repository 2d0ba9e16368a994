"""The objective inside transformers' `Trainer`, for any causal language model, wrapped by PEFT or not.

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("gpt2"), LoraConfig(task_type="CAUSAL_LM"))
    tokens = TokenSet.contains(AutoTokenizer.from_pretrained("gpt2"), "X")
    args = TrainingArguments("out", max_steps=300, per_device_train_batch_size=4, learning_rate=1e-3)
    data = random_contexts(tokens.vocab_size, 1200)
    TokenSetTrainer(model, args, target=UniformTarget(tokens), train_dataset=data).train()

The model is called as a whole, so that wrappers for several devices see it, but asked for the logits of one position
only; the loss is made in chunks from the states that enter its output embedding. So no B x T x V tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, Trainer, default_data_collator

from ..base.loading import switch_off_dropout
from ..base.split_model import SplitModel, split
from ..errors import XFactorError
from ..lora.wrap import adapter_off
from ..lowmem.peft_parts import unwrapped
from ..objective.objectives import TiltedObjective, UniformObjective
from ..objective.targets import TiltedTarget, UniformTarget


class TokenSetTrainer(Trainer):
    """A `Trainer` that minimises the mean KL from the target, over every position of `input_ids` (B, T).

    Args:
        target: a `UniformTarget`, or a `TiltedTarget` with strengths (the teacher is the model with its adapters off,
            so it needs PEFT; solving for a rate takes samples, which `xfactor_peft.train` draws).
        kl_to_base: as in `ObjectiveOptions`.

    The share of probability on the set is logged as `set_mass`. Padding is not looked at: cut texts to one length. The
    base's dropout is switched off, as everywhere in this package; LoRA's own stays.

    Raises:
        XFactorError: a model whose logits are not its output embedding times its states, or a target that does not fit.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: Any = None,
        *,
        target: UniformTarget | TiltedTarget,
        kl_to_base: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _switch_off_base_dropout(model)
        plain = split(unwrapped(model)).model
        self._split_model = _Through(plain, whole=[plain])
        off = partial(adapter_off, model) if isinstance(model, PeftModel) else None
        self._objective = _objective(self._split_model, target, kl_to_base, off)
        self._masses: list[float] = []
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over positions, not a sum to be divided by labels

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean KL; the output is {"set_mass": ...}."""
        self._split_model.whole[0] = model
        result = self._objective(inputs["input_ids"])
        if model.training:
            self._masses.append(float(result.set_mass))
        return (result.loss, {"set_mass": result.set_mass}) if return_outputs else result.loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """The loss without outputs: there is nothing to gather over a whole dataset."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._masses and "loss" in logs:
            logs["set_mass"] = sum(self._masses) / len(self._masses)
            self._masses.clear()
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True)
class _Through(SplitModel):
    """Hidden states by way of the whole model's forward pass, so that its wrappers' hooks run.

    `whole` holds the same model, as the Trainer wrapped it.
    """

    whole: list[nn.Module] = field(default_factory=list, compare=False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        states: list[torch.Tensor] = []
        hook = self.model.get_decoder().register_forward_hook(lambda _, __, output: states.append(output[0]))
        try:
            self.whole[0](input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        return states[0]


def random_contexts(vocabulary: int, count: int, *, length: int = 64, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`count` texts of random ids {"input_ids": (length,)}: what `xfactor_peft.train` feeds for a uniform target."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": ids} for ids in torch.randint(vocabulary, (count, length), generator=generator)]


def _switch_off_base_dropout(model: nn.Module) -> None:
    own = [part for m in model.modules() if isinstance(m, LoraLayer) for part in m.lora_dropout.values()]
    rates = [(part, part.p) for part in own if isinstance(part, nn.Dropout)]
    switch_off_dropout(model)
    for part, rate in rates:
        part.p = rate


def _objective(
    split_model: SplitModel, target: UniformTarget | TiltedTarget, kl_to_base: float, off: Callable | None
) -> nn.Module:
    if isinstance(target, UniformTarget):
        return UniformObjective(split_model, target, kl_to_base, off)
    if target.rates is not None or off is None:
        raise XFactorError(
            "in the Trainer a TiltedTarget needs strengths, TiltedTarget.of(tokens, strength=L), and PEFT"
        )
    objective = TiltedObjective(split_model, target, off)
    objective.strengths.copy_(torch.tensor([goal.strength for goal in target.goals]))
    return objective
