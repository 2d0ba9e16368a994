"""The correctness checks of what the benchmark times; they come first, and when one fails nothing is timed.

Every precision's losses are compared with those of plain transformers and PEFT in float32, as one writes it by their
documentation, from the same weights on the same inputs. Adam hides a gradient's scale, so the quantised layers have a
check of their own. An error is ||ours - plain|| / ||plain||.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import xfactor_peft as xf
from xfactor_peft.base.loading import Base
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear
from xfactor_peft.sampling.contexts import batches

from ..process import OnStep
from ..store import Record
from . import arms
from .measure import Models, train
from .plan import Run
from .presets import Settings

SETTINGS, LR = Settings(steps=6, seq_len=16), 1e-3
LIMITS = {
    arms.FULL: 1e-4, arms.FULL_BF16: 0.01, arms.FULL_8BIT_ADAM: 0.01,
    arms.LORA_FP32: 1e-4, arms.LORA_BF16: 0.01, arms.LORA_INT8: 0.01, arms.LORA_NF4: 0.05,
}  # fmt: skip
LAYERS = {Int8Linear: 0.03, NF4Linear: 2e-5}  # an int8 product rounds the rows of x to 8 bits, too


def run_checks(spec: Record, on_step: OnStep, folders: dict[str, str], device: str) -> Record:
    """Every check on `spec["model"]`; {"ok": all of them, "checks": [...], "model": the base's record}."""
    models, name = Models(folders, device), spec["model"]
    plain = {method: plain_losses(models.load(name), method) for method in ("full", "lora")}
    found = [quantized_layer(kind, limit) for kind, limit in LAYERS.items()]
    for arm, limit in LIMITS.items():
        run = Run("train", arm, name, SETTINGS)
        base = models.load_for(run)
        history = train(run, base, lambda step: None, LR).history
        losses = torch.tensor([step.loss for step in history])
        found.append(verdict(f"losses of {arm.label}", limit, (losses, plain[arm.method])))
    return {"ok": all(check["ok"] for check in found), "checks": found, "model": {**base.record(), "name": name}}


def verdict(name: str, limit: float, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Record:
    """The largest relative error of (actual, expected) pairs against its limit."""
    error = torch.stack([(a.double() - e.double()).norm() / e.double().norm() for a, e in pairs]).max().item()
    return {"name": name, "error": error, "limit": limit, "ok": error <= limit}  # False for NaN


def plain_losses(base: Base, method: str) -> torch.Tensor:
    """Losses of plain transformers and PEFT, with the whole logits at once."""
    tokens = xf.TokenSet.contains(base.tokenizer, SETTINGS.contains, vocab_size=base.vocab_size)
    target, losses = xf.UniformTarget(tokens).probabilities(base.device), []
    inputs = batches(base, "random", SETTINGS.batch_size, SETTINGS.seq_len, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base.choice.folder, dtype=torch.float32).to(base.device)
    if method == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], LR)
    for ids, _ in zip(inputs, range(SETTINGS.steps), strict=False):
        log_q = F.log_softmax(model.eval()(input_ids=ids.to(base.device)).logits.flatten(0, 1), dim=-1)
        loss = F.kl_div(log_q, target.expand_as(log_q), reduction="batchmean")
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def quantized_layer(kind: type, limit: float) -> Record:
    """An 8-bit or 4-bit layer against a plain one with its dequantised weight: output and gradient of the input.

    The weight comes transposed, as a Conv1D's does; a few rows (decoding) take another path than many (training).
    """
    generator, pairs = torch.Generator().manual_seed(1), []
    layer = kind.from_weight(torch.randn(256, 384, generator=generator).T / 16, torch.randn(384, generator=generator))
    for rows in (3, 63):
        x, upstream = (torch.randn(rows, width, generator=generator) for width in (256, 384))
        sides = []
        for forward in (layer, lambda x: F.linear(x, layer.dequantize(), layer.bias)):
            mine = x.clone().requires_grad_()
            y = forward(mine)
            y.backward(upstream)
            sides.append((y.detach(), mine.grad))
        pairs += zip(*sides, strict=True)
    return verdict(f"{kind.__name__} against its dequantised twin", limit, *pairs)
