"""Split a causal language model into a trunk (ids -> hidden states) and its output embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import XFactorError, first_line
from ..lowmem.gguf_layers import GgufLinear, PackedMatrix, linear
from ..lowmem.kv_cache import reserved_cache
from ..lowmem.quantized import QuantizedLinear


@dataclass(frozen=True)
class SplitModel:
    """logits = F.linear(trunk(ids), weight, bias), so that a loss can make the logits in chunks.

    `tilt` (V,) is added to the logits when it is given: the exact logit bias, for the teacher and the frontier.
    """

    model: PreTrainedModel
    tilt: torch.Tensor | None = None

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states, after the final norm; (B, T) ids -> (B, T, D)."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    @property
    def weight(self) -> torch.Tensor | PackedMatrix:
        """W, the output embedding, (V, D); a `PackedMatrix` for a GGUF file's."""
        head = self.model.get_output_embeddings()
        plain = head.get_base_layer() if isinstance(head, LoraLayer) else head
        return plain.matrix if isinstance(plain, GgufLinear) else head.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """b, (V,), or None."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits, an active set head's term and the tilt included; (..., D) -> (..., V)."""
        head: nn.Module = self.model.get_output_embeddings()
        # PEFT's wrapper adds the set head; the plain product is the same for every other head, quantised or not.
        z = head(hidden) if isinstance(head, LoraLayer) else linear(hidden, self.weight, self.bias)
        return z if self.tilt is None else z.float() + self.tilt


def split(model: PreTrainedModel) -> SplitModel:
    """Split `model`, after checking on eight tokens that the two parts give its logits, also from a key-value cache.

    Raises:
        XFactorError: the model has no output embedding, or does something after it (soft-capping,
            scaling), so that logits made from hidden states alone would be wrong; it has no key-value cache, so that
            samples would forget their context; or its own weights give logits that are not finite.
    """
    if model.get_output_embeddings() is None:
        raise XFactorError(f"{type(model).__name__} has no output embedding; a causal language model is needed")
    split_model = SplitModel(model)
    device = split_model.weight.device
    rows = split_model.weight.shape[0]
    # not the first ones, which are special tokens: their states are large and pass rounding on many times over
    ids = torch.arange(rows // 2, rows // 2 + 8, device=device).remainder(rows)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        try:
            expected = model(input_ids=ids, use_cache=False).logits.float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise XFactorError(
                f"{type(model).__name__} cannot run a forward pass as it is configured ({first_line(error)}); see its "
                "config.json"
            ) from error
        hidden = split_model.hidden(ids)
        actual = split_model.logits(hidden).float()
        _check_cache(split_model, ids, hidden)
    model.train(was_training)
    if not torch.isfinite(expected).all():
        raise XFactorError(
            f"{type(model).__name__} gives logits that are not finite before anything is trained: its own weights hold "
            "NaN or overflow; take another copy of `model`, or `dtype=fp32` if it was bf16"
        )
    tolerance = 0.02 if split_model.weight.dtype == torch.bfloat16 else 1e-3
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # unseen where logits are small
    if capped or (actual - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1):
        raise XFactorError(
            f"{type(model).__name__} changes its logits after the output embedding (soft-capping or scaling), "
            "which the chunked loss does not do; this architecture is not supported"
        )
    return split_model


def _check_cache(split_model: SplitModel, ids: torch.Tensor, hidden: torch.Tensor) -> None:
    """The states of the last two of `ids` are the same when one token at a time follows a prefix in a cache.

    A model that has no such cache takes the argument and drops it, or stops at it.
    """
    model, (_, length) = split_model.model, ids.shape
    cache, parts = reserved_cache(model.config, length), (ids[:, :-2], ids[:, -2:-1], ids[:, -1:])
    try:
        outputs = [model.base_model(input_ids=part, past_key_values=cache, use_cache=True) for part in parts]
    except (TypeError, AttributeError, ValueError, IndexError, NotImplementedError) as error:
        raise XFactorError(
            f"{type(model).__name__} does not run with a key-value cache ({first_line(error)}), so no text can be "
            "sampled; this architecture is not supported"
        ) from error
    expected = hidden[:, -2:].float()
    distance = (torch.cat([o.last_hidden_state for o in outputs[1:]], dim=1).float() - expected).norm()
    quantised = any(isinstance(module, QuantizedLinear) for module in model.modules())  # rows of x are rounded, too
    if distance > (0.3 if quantised else 0.05) * expected.norm():
        raise XFactorError(
            f"{type(model).__name__} gives other states with a key-value cache than without, so its samples would not "
            "be its own; this architecture is not supported"
        )
