"""The library speaks of fields, the command line of flags: one table maps them.

Messages of the library name a field in backticks, alone (`batch_size`) or with a value (`checkpointing=on`).
"""

from __future__ import annotations

import re

_SAME = (
    "alpha", "adapter", "auto_batch", "batch_size", "beta", "chars", "chat", "checkpointing", "contains",
    "contexts", "device", "dtype", "force", "fsdp", "goal", "grad_accum", "ignore_case", "kl_to_base", "keep",
    "length", "list", "lr", "max_new_tokens", "method", "model", "offline", "optimizer", "output", "outside_price",
    "phrases", "port", "prompts", "rate", "rates_from", "regex", "repeats", "resume", "revision", "rules", "same_rate",
    "save_every", "scale", "script", "seed", "seq_len", "sequence_level", "sequence_steps", "steps", "system",
    "temperature", "texts", "tensors", "token_ids", "top_k", "top_p", "weight_decay", "weights", "words",
)  # fmt: skip
"""Fields whose flag has their name."""
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _SAME} | {
    "backend": "--quant-backend",
    "dial": "--no-dial",
    "early_stop": "--no-early-stop",
    "goal.rate": "--target-rate",
    "goal.strength": "--lambda",
    "lora.alpha": "--lora-alpha",
    "lora.dropout": "--lora-dropout",
    "lora.r": "--lora-r",
    "lora.target": "--target",
    "lora.variant": "--lora-variant",
    "memory.budget": "--memory-budget",
    "quantization": "--load-in-8bit / --load-in-4bit",
    "quantization=int8": "--load-in-8bit",
    "quantization=nf4": "--load-in-4bit",
    "repo": "--push-to-hub",
    "root": "--adapters-dir",
    "trackers": "--log-with",
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
