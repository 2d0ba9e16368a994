"""The two stacks with one recipe: each loads a model, and makes the loss of a batch. Imports are each stack's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .arms import Arm

Loss = Callable[[torch.Tensor], torch.Tensor]


class Ours:
    """This package."""

    @staticmethod
    def load(arm: Arm, checkpoint: str) -> nn.Module:
        from xfactor_peft.lowmem.imports import leave_out_bitsandbytes

        leave_out_bitsandbytes()  # as the command line does for runs that it takes no part in

        import xfactor_peft as xf

        return xf.load(checkpoint, xf.LoadOptions(arm.dtype, "cpu", arm.quantization)).model

    @staticmethod
    def prepare(arm: Arm, model: nn.Module, target: torch.Tensor) -> tuple[nn.Module, Loss]:
        import xfactor_peft as xf
        from xfactor_peft.base.split_model import split
        from xfactor_peft.lora.wrap import add_lora
        from xfactor_peft.lowmem.activations import prepare_for_training

        prepare_for_training(model, arm.checkpointing)
        parts, mask = split(model), target > 0
        torch.manual_seed(0)
        model = add_lora(model, xf.LoraOptions(r=8, alpha=16))
        return model, lambda ids: xf.kl_loss(parts.hidden(ids), parts.weight, target, mask).loss


class Plain:
    """The usual stack as its documentation has it: transformers, PEFT, bitsandbytes, the KL on full logits."""

    @staticmethod
    def load(arm: Arm, checkpoint: str) -> nn.Module:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        dtype = torch.float32 if arm.dtype == "fp32" else torch.bfloat16
        quantization = {
            None: None,
            "int8": BitsAndBytesConfig(load_in_8bit=True),
            "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
        }[arm.quantization]
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, quantization_config=quantization, **no_dropout
        )

    @staticmethod
    def prepare(arm: Arm, model: nn.Module, target: torch.Tensor) -> tuple[nn.Module, Loss]:
        from peft import LoraConfig, get_peft_model

        if arm.method == "lora":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"]))

        def loss(ids: torch.Tensor) -> torch.Tensor:
            log_q = F.log_softmax(model(input_ids=ids).logits.float().flatten(0, 1), dim=-1)
            return F.kl_div(log_q, target.expand_as(log_q), reduction="batchmean")

        return model, loss


STACKS = {"ours": Ours, "plain": Plain}
