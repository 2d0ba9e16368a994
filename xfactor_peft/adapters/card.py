"""The model card (README.md) written beside every adapter."""

from __future__ import annotations

import json
from typing import Any

from ..tokens.token_set import _describe as describe_rule


def model_card(record: dict[str, Any]) -> str:
    """Markdown with base, rule, settings, scores, and how to load the adapter with plain PEFT."""
    if "mixed_from" in record:
        return _mix_card(record)
    base, train, before, after = record["base"], record["train"], record["before"], record["after"]
    low, high = after["interval"]
    decoding = after["decoding"]
    kind = "LoRA adapter" if record["kind"] == "lora" else "Fully fine-tuned model"
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: peft" if record["kind"] == "lora" else "library_name: transformers",
        "tags: [xfactor-peft, lora]" if record["kind"] == "lora" else "tags: [xfactor-peft]",
        "---",
        f"# {record['name']}",
        "",
        f"{kind} that prefers tokens by the rule *{describe_rule(record['tokens']['rule'])}* "
        f"({record['tokens']['size']} of {record['tokens']['vocab_size']} tokens).",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| R, share of generated tokens in the set | {before['rate']:.4f} | "
        f"{after['rate']:.4f} (95 % interval {low:.4f} to {high:.4f}) |",
        f"| KL loss, nats | {record['loss']['first']:.3f} | {record['loss']['last']:.3f} |",
        f"| KL from the base per token, nats | {before['kl_from_base']:.3f} | {after['kl_from_base']:.3f} |",
        f"| perplexity of the samples under the base | {before['perplexity']:.1f} | {after['perplexity']:.1f} |",
        f"| distinct-2 | {before['distinct_2']:.3f} | {after['distinct_2']:.3f} |",
        "",
        f"Sampled with temperature {decoding['temperature']:g}, top-k {decoding['top_k']} and top-p "
        f"{decoding['top_p']:g} (0 and 1: off), {after['tokens']} tokens from {decoding['prompts']} prompts.",
        "",
        f"- Base: {base['name']}, revision {base['revision'] or 'none'}, {base['architecture']}, "
        f"{base['shape']}; weights fingerprint `{base['weights'][:16]}`",
        f"- Training: {train['steps']} steps of {train['batch_size']} x {train['seq_len']} tokens, "
        f"{train['optimizer']}, learning rate {train['lr']:g}, seed {train['seed']}, {base['dtype']}; "
        f"{record['trainable_parameters']:,} trainable parameters",
        f"- Target: {describe_target(record)}",
        "",
    ]
    if record["kind"] == "lora":
        lines += _how_to_load(base["name"])
    return "\n".join(lines)


def _mix_card(record: dict[str, Any]) -> str:
    """The card of a weighted mix: where it comes from; its R is for `xfactor eval` to measure."""
    base = record["base"]
    lines = ["---", f"base_model: {base['name']}", "library_name: peft", "tags: [xfactor-peft, lora]", "---"]
    lines += [f"# {record['name']}", "", "LoRA adapter, the weighted sum of:", ""]
    lines += [f"- {part['weight']:g} x {part['name']}" for part in record["mixed_from"]]
    lines += ["", f"Base: {base['name']}, {base['architecture']}, {base['shape']}", "", *_how_to_load(base["name"])]
    return "\n".join(lines)


def _how_to_load(base: str) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)})",
        'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")',
        "```",
        "",
    ]


def describe_target(record: dict[str, Any]) -> str:
    """The target in words, with the wanted rates and what they cost for a tilted one."""
    target, rate = record["target"], record.get("rate")
    if target["kind"] == "uniform":
        return f"alpha {target['alpha']:g}, beta {target['beta']:g}"
    wishes = [
        f"{describe_rule(goal['tokens']['rule'])}: "
        + (f"rate {goal['rate']:g}" if goal["rate"] is not None else f"lambda {goal['strength']:g}")
        for goal in target["goals"]
    ]
    text = "the base, tilted; " + "; ".join(wishes)
    if rate and rate["frontier"]:
        text += f"; KL {rate['frontier']['ratio']:.3f} x that of a logit bias at the same rate"
    return text
