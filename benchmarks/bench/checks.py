"""The correctness checks of what the benchmark times; they come first, and when one fails nothing is timed.

Each compares a fast path with a plain one: relative error ||ours - plain|| / ||plain||, against a stated limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import xfactor_peft as xf
from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import split
from xfactor_peft.lora.wrap import lora_config, register_layers
from xfactor_peft.lowmem.activations import prepare_for_training
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear
from xfactor_peft.objective import kl as losses
from xfactor_peft.objective import reference
from xfactor_peft.training.optimizers import build_optimizer

Check = dict[str, Any]
FP32, BF16 = 2e-5, 0.02
INT8_ACTIVATIONS = 0.03  # rows of x are rounded to 8 bits, too, where the CPU multiplies int8; see lowmem.int8_matmul
LONGER = 7  # odd on purpose


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def verdict(name: str, error: float, limit: float) -> Check:
    return {"name": name, "error": error, "limit": limit, "ok": error <= limit}  # False for NaN


def fused_kl(base: Base) -> list[Check]:
    """The chunked KL against whole logits: loss, and the gradients of states and embedding, with the model's own W."""
    tokens = xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    target, mask = xf.UniformTarget(tokens).probabilities(base.device), tokens.mask(base.device)
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype, limit in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        weight = split(base.model).weight.detach().to(dtype)
        hidden = torch.randn(LONGER * 9, weight.shape[1], generator=generator).to(weight)
        sides = []
        for loss in (losses.kl_loss, reference.kl_loss):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            value = loss(h, w, target, mask)[0]
            value.backward()
            sides.append((value.detach(), h.grad, w.grad))
        name = f"fused KL against whole logits, {str(dtype).removeprefix('torch.')}"
        found.append(verdict(name, max(relative(a, b) for a, b in zip(*sides, strict=True)), limit))
    return found


def quantized_layer(kind: type, limit: float) -> Check:
    """An 8-bit or 4-bit layer against a plain one with its dequantised weight: output and gradient of the input.

    The weight comes transposed, as a Conv1D's does; a few rows (decoding) take another path than many (training).
    """
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(256, 384, generator=generator).T / 16, torch.randn(384, generator=generator)
    layer, errors = kind.from_weight(weight, bias), []
    for rows in (3, LONGER * 9):
        x = torch.randn(rows, 256, generator=generator)
        upstream = torch.randn(rows, 384, generator=generator)
        sides = []
        for forward in (layer, lambda x: F.linear(x, layer.dequantize(), layer.bias)):
            mine = x.clone().requires_grad_()
            y = forward(mine)
            y.backward(upstream)
            sides.append((y.detach(), mine.grad))
        errors += [relative(a, b) for a, b in zip(*sides, strict=True)]
    return verdict(f"{kind.__name__} against its dequantised twin", max(errors), limit)


def quantization_error(kind: type, limit: float) -> Check:
    """The dequantised weight against the one that was quantised: the format's own rounding, and no more."""
    weight = torch.randn(384, 256, generator=torch.Generator().manual_seed(2)) / 16
    error = relative(kind.from_weight(weight, None).dequantize(), weight)
    return verdict(f"{kind.__name__}: weight after and before", error, limit)


def fused_lora(load: Callable[[], Base]) -> Check:
    """LoRA as one function against PEFT's own layers: logits, and the gradient of every A and B."""
    sides = []
    for register in (True, False):
        base = load()
        config = lora_config(base.model, xf.LoraOptions(r=4))
        model = get_peft_model(base.model, register_layers(config) if register else config)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
        kinds = {type(module).__name__ for module in model.modules() if isinstance(module, LoraLayer)}
        assert (kinds == {"FusedLoraLinear"}) == register, kinds  # else it would compare a path with itself
        logits = model(input_ids=_ids(base)).logits
        (logits.float() ** 2).mean().backward()
        grads = [p.grad for n, p in sorted(model.named_parameters()) if p.grad is not None and "lora_" in n]
        sides.append([logits.detach(), *grads])
    return verdict("fused LoRA against PEFT's own", max(relative(a, b) for a, b in zip(*sides, strict=True)), 1e-4)


def prepared_model(base: Base) -> Check:
    """Logits of the model as it is trained (own loader, one-kernel GELU, own attention) against plain transformers."""
    plain = AutoModelForCausalLM.from_pretrained(base.choice.folder, dtype=torch.float32).eval().to(base.device)
    prepare_for_training(base.model)
    with torch.no_grad():
        ours, theirs = (model(input_ids=_ids(base), use_cache=False).logits for model in (base.model, plain))
    return verdict("prepared model against plain transformers", relative(ours, theirs), 1e-4)


def low_memory_optimizer() -> Check:
    """8-bit Adam against Adam: where ten steps on a regression lead, over the distance gone."""
    generator = torch.Generator().manual_seed(4)
    start, x, y = (torch.randn(128, 64, generator=generator) for _ in range(3))
    ends = []
    for name in ("adam8bit", "adam"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = build_optimizer(name, [weight], 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(x @ weight.T @ weight, y).backward()
            optimizer.step()
        ends.append(weight.detach() - start)
    return verdict("8-bit Adam against Adam, after ten steps", relative(*ends), 0.1)


def run_checks(model: str, places: Any) -> dict[str, Any]:
    """Every check on `model`; {"ok": all of them, "checks": [...], "model": the base's record}."""

    def load() -> Base:
        options = xf.LoadOptions(dtype="fp32", device=places.device)
        return xf.load(places.folders.get(model, model), options, offline=True)

    base = load()
    found = [
        *fused_kl(base),
        quantized_layer(Int8Linear, INT8_ACTIVATIONS),
        quantized_layer(NF4Linear, FP32),
        quantization_error(Int8Linear, 0.015),
        quantization_error(NF4Linear, 0.12),
        fused_lora(load),
        prepared_model(base),
        low_memory_optimizer(),
    ]
    record = {**base.record(), "name": model}
    return {"ok": all(check["ok"] for check in found), "checks": found, "model": record}


def _ids(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(base.vocab_size, (2, LONGER), generator=generator).to(base.device)
