"""The usual stack as one writes it by its documentation: transformers, PEFT, bitsandbytes, the KL on full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .arms import Arm


def load(arm: Arm, checkpoint: Path) -> torch.nn.Module:
    dtype = torch.float32 if arm.dtype == "fp32" else torch.bfloat16
    quantization = {
        None: None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }[arm.quantization]
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=quantization, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )


def prepare(arm: Arm, checkpoint: Path, target: torch.Tensor) -> Callable[[Iterator[torch.Tensor]], float]:
    """A function that makes one training step on the next batch and returns its loss."""
    model = load(arm, checkpoint)
    if arm.method == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(inputs: Iterator[torch.Tensor]) -> float:
        logits = model(input_ids=next(inputs)).logits
        log_q = F.log_softmax(logits.float().flatten(0, 1), dim=-1)
        loss = F.kl_div(log_q, target.expand_as(log_q), reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
