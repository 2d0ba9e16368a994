"""The model card (README.md) written beside every adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

from ..tokens.printable import counted
from ..tokens.rule import Rule


def model_card(record: dict[str, Any]) -> str:
    """Markdown with base, rule, settings, scores (where they were measured), and how to load it with plain PEFT."""
    lora = record["kind"] == "lora"
    lines = [
        "---",
        *_base_model(record["base"]),
        "library_name: peft" if lora else "library_name: transformers",
        "tags: [xfactor-peft, lora]" if lora else "tags: [xfactor-peft]",
        "---",
        f"# {record['name']}",
        "",
        *(
            _mixed(record)
            if "mixed_from" in record
            else _phrases(record)
            if record.get("phrases")
            else _trained(record)
        ),
        "",
    ]
    return "\n".join(lines + (_how_to_load(record["base"]["name"], record["name"]) if lora else []))


def renamed_card(card: bytes, names: Iterable[str], new: str) -> bytes:
    """A card whose heading and commands say `new` for any of `names`; the rest stays, whoever wrote it."""
    text = card.decode("utf-8", "surrogateescape")
    for old in names:
        text = text.replace(f"\n# {old}\n", f"\n# {new}\n", 1)
        text = text.replace(_option(old), _option(new)).replace(_place(old), _place(new))
    return text.encode("utf-8", "surrogateescape")


def _base_model(base: dict[str, Any]) -> list[str]:
    """The metadata that links to the base; the Hub refuses a card in which it is a path or a file of a repository."""
    on_the_hub = base.get("revision") and ":" not in base["name"]
    return [f"base_model: {base['name']}"] if on_the_hub else []


def _mixed(record: dict[str, Any]) -> list[str]:
    """Where a weighted mix comes from; its R is not known until it is measured."""
    base = record["base"]
    parts = [f"- {part['weight']:g} x {part['name']}" for part in record["mixed_from"]]
    sources = ["LoRA adapter, the weighted sum of:", "", *parts]
    return [*sources, "", f"Base: {base['name']}, {base['architecture']}, {base['shape']}"]


def _phrases(record: dict[str, Any]) -> list[str]:
    """What an adapter for phrases was made of, and what came of it."""
    base, phrases = record["base"], record["phrases"]
    before, after = phrases["before"], phrases["after"]
    goals = [f"- {about(goal)}: {asked(goal)}" for goal in phrases["goals"][:20]]
    more = [f"- and {len(phrases['goals']) - 20} more"] if len(phrases["goals"]) > 20 else []
    scores = []
    if before and after:
        scores = [
            "| on prompts that training never saw | before | after |",
            "|---|---|---|",
            f"| occurrences in 1,000 words | {before['per_1000_words']:.2f} | {after['per_1000_words']:.2f} |",
            f"| KL from the base per token, nats | 0 | {after['kl']:.4f} |",
            f"| distinct-2 | {before['distinct_2']:.3f} | {after['distinct_2']:.3f} |",
            "",
        ]
    return [
        "LoRA adapter that changes how often words and phrases are said:",
        "",
        *goals,
        *more,
        "",
        *scores,
        f"- Base: {base['name']}, revision {base['revision'] or 'none'}, {base['architecture']}, "
        f"{base['shape']}; weights fingerprint `{base['weights'][:16]}`",
        f"- A head of rank {record['lora']['r']} on {phrases['tokens']} tokens; `rules` in the record makes it again",
    ]


def about(goal: dict[str, Any], most: int = 8) -> str:
    """What a goal of phrases is about: its list by name, "slop.txt, 203 patterns", or the phrases themselves."""
    texts = [pattern["text"] for pattern in goal["patterns"]]
    if goal["name"] in (asked(goal), *texts):
        return ", ".join(texts[:most]) + ", ..." * (len(texts) > most)
    return f"{goal['name']}, {counted(len(texts), 'pattern')}"


def asked(goal: dict[str, Any]) -> str:
    """What was wanted of a goal of phrases, in words."""
    unit = {"x": "times the base's own rate", "w": "in 1,000 words", "t": "in 1,000 tokens"}[goal["unit"]]
    return f"{goal['rate']:g} {unit}" if goal["rate"] else "never"


def _trained(record: dict[str, Any]) -> list[str]:
    base, train, tokens = record["base"], record["train"], record["tokens"]
    kind = "LoRA adapter" if record["kind"] == "lora" else "Fully fine-tuned model"
    scores = [*_scores(record), ""] if record["before"] and record["after"] else []
    return [
        f"{kind} that prefers tokens by the rule *{Rule.from_record(tokens['rule']).describe()}* "
        f"({tokens['size']} of {tokens['vocab_size']} tokens).",
        "",
        *scores,
        f"- Base: {base['name']}, revision {base['revision'] or 'none'}, {base['architecture']}, "
        f"{base['shape']}; weights fingerprint `{base['weights'][:16]}`",
        f"- Training: {steps_made(record)}, seed {train['seed']}, {base['dtype']}; "
        f"{record['trainable_parameters']:,} trainable parameters",
        f"- Target: {describe_target(record)}",
    ]


def steps_made(record: dict[str, Any]) -> str:
    """The steps that were made, of those that were allowed, and what each was of."""
    train, made = record["train"], record.get("steps_made")
    if made == 0:
        return "no steps, the set head was solved"
    steps = counted(train["steps"], "step") if made in (None, train["steps"]) else f"{made} of {train['steps']} steps"
    return (
        f"{steps} of {train['batch_size']} x {train['seq_len']} tokens, {train['optimizer']}, "
        f"learning rate {train['lr']:g}"
    )


def _scores(record: dict[str, Any]) -> list[str]:
    before, after, loss = record["before"], record["after"], record["loss"]
    (low, high), decoding = after["interval"], after["decoding"]
    return [
        "| | before | after |",
        "|---|---|---|",
        f"| R, share of generated tokens in the set | {before['rate']:.4f} | "
        f"{after['rate']:.4f} (95 % interval {low:.4f} to {high:.4f}) |",
        *([f"| KL loss, nats | {loss['first']:.3f} | {loss['last']:.3f} |"] if loss else []),
        f"| KL from the base per token, nats | {before['kl_from_base']:.3f} | {after['kl_from_base']:.3f} |",
        f"| perplexity of the samples under the base | {before['perplexity']:.1f} | {after['perplexity']:.1f} |",
        f"| distinct-2 | {before['distinct_2']:.3f} | {after['distinct_2']:.3f} |",
        "",
        f"Sampled with temperature {decoding['temperature']:g}, top-k {decoding['top_k']} and top-p "
        f"{decoding['top_p']:g} (0 and 1: off), {after['tokens']} tokens from {decoding['prompts']} prompts.",
    ]


def describe_target(record: dict[str, Any]) -> str:
    """The target in words, with the wanted rates and what they cost for a tilted one."""
    target, rate = record["target"], record.get("rate")
    if target["kind"] == "uniform":
        return f"alpha {target['alpha']:g}, beta {target['beta']:g}"
    goals = [
        f"{Rule.from_record(goal['tokens']['rule']).describe()}: "
        + (f"rate {goal['rate']:g}" if goal["rate"] is not None else f"lambda {goal['strength']:g}")
        for goal in target["goals"]
    ]
    text = "the base, tilted; " + "; ".join(goals)
    if rate and rate.get("head"):
        text += f"; after every family of prompts, {rate['head']['price']:.3f} x the KL of one constant"
    elif rate and rate["frontier"]:
        text += f"; KL {rate['frontier']['ratio']:.3f} x that of a logit bias at the same rate"
    return text


def _how_to_load(base: str, name: str) -> list[str]:
    """With this package, and with plain PEFT; the demo model is a folder of the package, no name that the Hub knows."""
    if base == "demo":
        imports = ["import xfactor_peft as xf", "from peft import PeftModel"]
        load = 'xf.load("demo").model'
    else:
        imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
        load = f"AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)})"
    return [
        "```",
        f'xfactor generate --adapter none {_option(name)}"Once upon a time"',
        "```",
        "",
        "```python",
        *imports,
        "",
        f"base = {load}",
        f"model = PeftModel.from_pretrained(base, {_place(name)})  # this folder",
        "```",
        "",
    ]


def _option(name: str) -> str:
    return f"--adapter {shlex.quote(name)} "


def _place(name: str) -> str:
    return json.dumps(f"adapters/{name}", ensure_ascii=False)
