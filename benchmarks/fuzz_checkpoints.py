"""Mutated model folders: each is read as transformers reads it, or refused in one line; never silently otherwise.

    python benchmarks/fuzz_checkpoints.py --json benchmarks/results/reliability/fuzz_checkpoints.json

Tiny random models of four families. One field at a time of config.json, generation_config.json, tokenizer_config.json
and tokenizer.json takes another value, one tensor at a time is taken away, cut, stretched, retyped or added, and
the index of a sharded model is damaged. What has to happen is known for each kind:

    config, tokenizer      logits and ids are those of transformers' own loader, or a refusal
    generation_config      logits, R and perplexity are those without the file: it is about text for people
    tensors, index         a refusal that names the tensor or the file (transformers would make up what is missing)

Anything else (another exception, a warning in place of an error, other numbers) is printed and makes the exit status 1.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from bench import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import xfactor_peft as xf
from tests.tiny import KINDS, tiny_model_folder
from xfactor_peft.base.split_model import split

TEXT, IDS = "The fox and 12 boxes; isn't it?\n XX", torch.arange(3, 27)[None]
OTHER_VALUES: dict[type, tuple[Any, ...]] = {
    bool: (True, False), int: (0, 1, 7, -1, 200), float: (0.0, 0.5, 2.0, -1.0, 1e-3),
    str: ("gelu", "relu", "silu", "", "X"), type(None): (True, 0, 3, "X"), list: ([], [1, 2]), dict: ({}, {"a": 1}),
}  # fmt: skip
GENERATION = {
    "repetition_penalty": 1.3, "min_p": 0.3, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "do_sample": False,
    "num_beams": 3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "forced_eos_token_id": 0,
    "forced_bos_token_id": 3, "suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [7], "max_length": 3,
    "min_length": 50, "max_new_tokens": 2, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "encoder_repetition_penalty": 2.0, "length_penalty": 2.0, "exponential_decay_length_penalty": [1, 2.0],
    "sequence_bias": [[[5], 10.0]], "guidance_scale": 2.0, "renormalize_logits": True, "remove_invalid_values":
    True, "use_cache": False, "penalty_alpha": 0.6, "diversity_penalty": 1.0, "num_beam_groups": 2,
    "watermarking_config": {"bias": 2.0}, "top_h": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One mutation: `change` edits a copied folder; `rule` says what has to become of it."""

    kind: str
    name: str
    rule: str
    change: Callable[[Path], None]


def edit(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, key: value}))

    return change


def field_cases(kind: str, source: Path) -> Iterator[Case]:
    """Every field of the JSON files, with values of its own type and of others."""
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / file).read_text())
        for key, value in content.items():
            for other in (*OTHER_VALUES[type(value)], None, "X", 3):
                if other != value or type(other) is not type(value):
                    yield Case(kind, f"{file} {key}={other}", "transformers", edit(file, key, other))
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
        yield Case(kind, f"tokenizer.json {key}=None", "transformers", edit("tokenizer.json", key, None))
    for key, value in GENERATION.items():
        yield Case(kind, f"generation_config.json {key}={value}", "measure", edit("generation_config.json", key, value))


def tensor_cases(kind: str, source: Path) -> Iterator[Case]:
    """Every tensor, spoilt in every way; a mask of an old checkpoint in GPT-2 is no spoiling."""
    spoil: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
        "missing": lambda t: None,
        "cut": lambda t: t[:-1].clone(),
        "stretched": lambda t: torch.cat([t, t[:1]]),
        "flat": lambda t: t.flatten()[:-1].clone(),
        "integers": lambda t: t.to(torch.int8),
    }
    for name in load_file(source / "model.safetensors"):
        for way, spoiled in spoil.items():

            def change(folder: Path, name: str = name, spoiled: Callable = spoiled) -> None:
                tensors = load_file(folder / "model.safetensors")
                value = spoiled(tensors.pop(name))
                save_file(tensors if value is None else {**tensors, name: value}, folder / "model.safetensors")

            yield Case(kind, f"{name} {way}", "refused", change)
    for extra, shape in (("transformer.h.0.attn.bias", (64,)), ("model.layers.0.extra.weight", (4, 4)), ("gate", (3,))):

        def add(folder: Path, extra: str = extra, shape: tuple[int, ...] = shape) -> None:
            tensors = load_file(folder / "model.safetensors")
            save_file({**tensors, extra: torch.ones(shape)}, folder / "model.safetensors")

        yield Case(kind, f"{extra} added", "refused", add)


def index_cases(kind: str, source: Path) -> Iterator[Case]:
    """A model in two files with an index that is wrong."""

    def sharded(folder: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
        content = damage(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index if content is None else content))

    def first(index: dict[str, Any]) -> str:
        return next(iter(index["weight_map"]))

    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a name dropped": lambda i: i["weight_map"].pop(first(i)) and None,
        "another file's": lambda i: i["weight_map"].__setitem__(first(i), "b.safetensors"),
        "a file that is not there": lambda i: i["weight_map"].__setitem__(first(i), "c.safetensors"),
        "a path upward": lambda i: i["weight_map"].__setitem__(first(i), "../a.safetensors"),
        "no map": lambda i: i.pop("weight_map") and None,
        "a map that is a list": lambda i: i.__setitem__("weight_map", []),
        "a list": lambda i: [],
        "an unknown tensor": lambda i: i["weight_map"].__setitem__("none.weight", "a.safetensors"),
    }
    for name, damage in damages.items():
        yield Case(kind, f"index: {name}", "refused", lambda folder, damage=damage: sharded(folder, damage))


@dataclass(frozen=True)
class Seen:
    logits: torch.Tensor
    ids: list[int]
    rate: float
    perplexity: float


@torch.no_grad()
def ours(folder: Path) -> Seen:
    base = xf.load(str(folder), xf.LoadOptions("fp32", "cpu"), offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    brief = xf.EvalOptions(("The fox",), 2, xf.SamplingOptions(max_new_tokens=6))
    scores = xf.evaluate(split(base.model), base.tokenizer, tokens, brief)
    return Seen(base.model(input_ids=IDS).logits, base.tokenizer(TEXT)["input_ids"], scores.rate, scores.perplexity)


@torch.no_grad()
def theirs(folder: Path) -> tuple[torch.Tensor, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS).logits, AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def judged(case: Case, folder: Path, untouched: Seen) -> str:
    """ "refused", "as transformers", "not affected", or what is wrong, in words that begin with "WRONG"."""
    try:
        seen = ours(folder)
    except xf.XFactorError as error:
        lines = str(error).strip().splitlines()
        return "refused" if len(lines) == 1 and len(lines[0]) < 600 else f"WRONG: a refusal of {len(lines)} lines"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:120]}"
    if case.rule == "refused":
        return "WRONG: loaded"
    if case.rule == "measure":
        same = torch.equal(seen.logits, untouched.logits) and (seen.rate, seen.perplexity) == (
            untouched.rate, untouched.perplexity,
        )  # fmt: skip
        return "not affected" if same else "WRONG: it changed what is measured"
    try:
        logits, ids = theirs(folder)
    except Exception as error:
        if "drop" in case.name and "dropout probability" in str(error):
            return "not affected"  # the base's dropout is switched off before anything runs
        return f"WRONG: loaded, but transformers refuses it: {type(error).__name__}: {str(error)[:80]}"
    if ids != seen.ids:
        return "WRONG: other ids than transformers'"
    equal = logits.shape == seen.logits.shape and torch.equal(logits.nan_to_num(), seen.logits.nan_to_num())
    return "as transformers" if equal else "WRONG: other logits than transformers'"


def all_cases(sources: dict[str, Path]) -> list[Case]:
    return [
        case
        for kind, source in sources.items()
        for cases in (field_cases, tensor_cases, index_cases)
        for case in cases(kind, source)
    ]


@click.command()
@click.option("--inputs", type=int, help="Only so many, drawn at random.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write a record.")
def main(inputs: int | None, seed: int, file: Path | None) -> None:
    torch.set_num_threads(1)
    outcomes, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        sources = {kind: tiny_model_folder(kind, Path(name) / kind) for kind in KINDS}
        untouched = {kind: ours(source) for kind, source in sources.items()}
        cases = all_cases(sources)
        chosen = cases if inputs is None else random.Random(seed).sample(cases, inputs)
        for case in chosen:
            folder = Path(name) / "changed"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sources[case.kind], folder)
            case.change(folder)
            outcome = judged(case, folder, untouched[case.kind])
            outcomes[outcome.split(":")[0]] += 1
            if outcome.startswith("WRONG"):
                wrong.append(f"{case.kind}: {case.name}: {outcome}")
                print(wrong[-1], flush=True)
    figures = {"checkpoints": len(chosen), "outcomes": dict(outcomes), "wrong": wrong}
    tiny.conclude(file, {"inputs": inputs, "seed": seed}, figures, ok=not wrong, hide=("wrong",))


if __name__ == "__main__":
    main()
