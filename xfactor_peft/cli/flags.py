"""The library speaks of fields, the command line of flags: one table maps them.

Messages of the library name a field in backticks, alone (`batch_size`) or with a value (`checkpointing=on`).
"""

from __future__ import annotations

import re

FLAGS = {
    "alpha": "--alpha",
    "adapter": "--adapter",
    "auto_batch": "--auto-batch",
    "backend": "--quant-backend",
    "batch_size": "--batch-size",
    "beta": "--beta",
    "chars": "--chars",
    "chat": "--chat",
    "checkpointing": "--checkpointing",
    "contains": "--contains",
    "contexts": "--contexts",
    "device": "--device",
    "dial": "--no-dial",
    "dtype": "--dtype",
    "early_stop": "--no-early-stop",
    "force": "--force",
    "fsdp": "--fsdp",
    "goal": "--goal",
    "goal.rate": "--target-rate",
    "goal.strength": "--lambda",
    "grad_accum": "--grad-accum",
    "ignore_case": "--ignore-case",
    "kl_to_base": "--kl-to-base",
    "keep": "--keep",
    "length": "--length",
    "list": "--list",
    "lora.alpha": "--lora-alpha",
    "lora.dropout": "--lora-dropout",
    "lora.r": "--lora-r",
    "lora.target": "--target",
    "lora.variant": "--lora-variant",
    "lr": "--lr",
    "max_new_tokens": "--max-new-tokens",
    "memory.budget": "--memory-budget",
    "method": "--method",
    "model": "--model",
    "offline": "--offline",
    "optimizer": "--optimizer",
    "output": "--output",
    "phrases": "--phrases",
    "port": "--port",
    "prompts": "--prompts",
    "quantization": "--load-in-8bit / --load-in-4bit",
    "quantization=int8": "--load-in-8bit",
    "quantization=nf4": "--load-in-4bit",
    "rate": "--rate",
    "rates_from": "--rates-from",
    "regex": "--regex",
    "repeats": "--repeats",
    "repo": "--push-to-hub",
    "resume": "--resume",
    "revision": "--revision",
    "root": "--adapters-dir",
    "rules": "--rules",
    "same_rate": "--same-rate",
    "save_every": "--save-every",
    "scale": "--scale",
    "script": "--script",
    "seed": "--seed",
    "seq_len": "--seq-len",
    "sequence_level": "--sequence-level",
    "sequence_steps": "--sequence-steps",
    "steps": "--steps",
    "system": "--system",
    "temperature": "--temperature",
    "texts": "--texts",
    "tensors": "--tensors",
    "token_ids": "--token-ids",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "trackers": "--log-with",
    "weight_decay": "--weight-decay",
    "weights": "--weights",
    "words": "--words",
}
RESUME = "xfactor_peft.resume"
"""Key of click's context under which the command that resumes the present run is found."""
_FIELD = re.compile(r"`([a-z_.]+)(?:=([^`]*))?`")


def as_flags(message: str, resume_command: str | None = None) -> str:
    """A message of the library with every field that has a flag written as that flag: `lora.r=4` -> --lora-r 4.

    A field that is True is a flag alone, and `resume=True` the whole command that resumes the present run. Text in
    backticks that is no field stays as it is.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if match[0] == "`resume=True`" and resume_command:
            return resume_command
        if (exact := f"{name}={value}") in FLAGS:
            return FLAGS[exact]
        if name not in FLAGS:
            return match[0]
        return FLAGS[name] if value in (None, "True") else f"{FLAGS[name]} {value}"

    return _FIELD.sub(flag, message)
