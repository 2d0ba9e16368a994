"""Words, phrases and scripts on a real model: the literal commands, and what else one could do.

    python benchmarks/phrases.py unslop --model MODEL --seeds 0,1,2      the command, and the other arms beside it
    python benchmarks/phrases.py rate --model MODEL                      one phrase at half and twice its rate
    python benchmarks/phrases.py script --model MODEL                    no Han, after prompts that ask for it
    python benchmarks/phrases.py like --model MODEL --text NOVEL.txt     200 words as often as in a novel
    python benchmarks/phrases.py matches --tokenizer FOLDER ...          matches of the automaton against `re`
    python benchmarks/phrases.py report                                  tables of all of them

MODEL is best the folder of tools/real_model.py. One JSON a row in benchmarks/results/phrases/.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from bench import store
from bench.command import train
from bench.phrases.arms import Arms
from bench.stats import over_seeds
from bench.store import REPOSITORY, RESULTS, Record
from bench.tables import NONE, Table
from transformers import AutoTokenizer

import xfactor_peft as xf
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.split_model import split
from xfactor_peft.phrases.lists import overused, writing_prompts
from xfactor_peft.phrases.rules import parse_rules
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import Pattern, found

FOLDER = RESULTS / "phrases"
BUILD = REPOSITORY / "build" / "phrases"
HAN = ("Write a poem in Chinese.", "Translate into Chinese: The sea is calm.", "用中文讲一个故事。", "请写一封信。",
       "How do you say good night in Chinese?", "日本語で短い物語を書いてください。",
       "List ten Chinese characters with their meanings.", "Write about Beijing in Chinese characters.")  # fmt: skip
BLOCK = 2000
_FOLDER = click.Path(path_type=Path, file_okay=False)
_model = click.option("--model", type=_FOLDER, required=True)


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    torch.set_num_threads(store.cores())


@main.command()
@_model
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--arms", default="exact,ban_of_completion,ban_of_first,preference", show_default=True)
@click.option("--force", is_flag=True, help="Measure again what has a result.")
def unslop(model: Path, seeds: str, arms: str, force: bool) -> None:
    """The literal command, its adapter's damage to plain prose, and the other arms on the same prompts."""
    for seed in map(int, seeds.split(",")):
        _once(f"unslop-seed{seed}", force, lambda seed=seed: _command(model, ["unslop", "--seed", str(seed)], seed))
        for arm in filter(None, arms.split(",")):
            _once(f"{arm}-seed{seed}", force, lambda seed=seed, arm=arm: _arm(model, arm, seed))


def _once(name: str, force: bool, make) -> None:
    if force or not (FOLDER / f"{name}.json").exists():
        record = make()
        store.write(FOLDER / f"{name}.json", {"name": name, **record, **store.provenance()})
        click.echo(f"{name}: { ({key: record[key] for key in SHOWN if key in record}) }")


SHOWN = ("tokenizers", "per_1000_words", "kl", "distinct_2", "prose", "seconds", "peak", "log_ratio", "characters")


def _command(model: Path, words: list[str], seed: int) -> Record:
    """Figures of one literal command, and of the adapter that it left."""
    keep = BUILD / "-".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in words)[:80]
    shutil.rmtree(keep, ignore_errors=True)
    one = train([*words, "--model", str(model)], store.cores(), keep=keep)
    if one["status"] != "ok":
        return one
    phrases = one.pop("record")["phrases"]
    bank = AdapterBank(xf.load(str(model)), keep.parent)
    arms = Arms(bank.base, TokenAutomaton(bank.base.tokenizer, overused(), bank.base.vocab_size), (), (), 0, 0)
    plain = arms.prose(split(bank.base.model))
    bank.load(str(keep))
    bank.use(str(keep))
    size = (keep / "adapter_model.safetensors").stat().st_size
    after = {key: phrases["after"][key] for key in ("per_1000_words", "interval", "kl", "distinct_2", "words")}
    before = {f"{key}_before": phrases["before"][key] for key in ("per_1000_words", "interval", "distinct_2", "words")}
    prose = {"prose": arms.prose(split(bank.base.model)), "prose_before": plain}
    found = {**one, **before, **after, **prose, "size": size, "risen": phrases["risen"]}
    return {"command": words, "seed": seed, **found, **_ratios(phrases)}


def _ratios(phrases: Record) -> Record:
    """Of goals that should have come five times or more: mean |log(found / wanted)|, and what chance makes of it."""
    after, place, pairs = phrases["after"], 0, []
    for goal in phrases["goals"]:
        size = len(goal["patterns"])
        found, wanted = sum(after["counts"][place : place + size]), goal["wanted_per_token"] * after["tokens"]
        place += size
        if wanted >= 5:
            pairs.append((found, wanted))
    if not pairs:
        return {}
    found, wanted = np.array(pairs).T
    chance = np.random.default_rng(0).poisson(wanted, (2000, len(wanted)))
    apart = [float(np.abs(np.log((counts + 0.5) / (wanted + 0.5))).mean()) for counts in (found, chance)]
    return {"goals": len(pairs), "log_ratio": apart[0], "log_ratio_by_chance": apart[1]}


def _arm(model: Path, arm: str, seed: int) -> Record:
    base = xf.load(str(model))
    fit, held_out = writing_prompts()
    automaton = TokenAutomaton(base.tokenizer, overused(), base.vocab_size)
    return {"arm": arm, "seed": seed, **getattr(Arms(base, automaton, fit, held_out, 128, 112), arm)(seed)}


@main.command()
@_model
@click.option("--phrase", default="a sense of", show_default=True)
@click.option("--rates", default="x0.5,x2", show_default=True)
@click.option("--force", is_flag=True)
def rate(model: Path, phrase: str, rates: str, force: bool) -> None:
    """One phrase at a factor of its own rate; 512 texts before and after."""
    for wanted in rates.split(","):
        rules = {"goals": [{"phrase": phrase, "rate": wanted}], "options": {"eval_texts": 512}}
        _once(f"rate-{wanted}", force, lambda rules=rules, wanted=wanted: _by_rules(model, rules) | {"wanted": wanted})


def _by_rules(model: Path, rules: Record) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.yaml"
        store.write(file, rules)  # JSON is YAML
        return {**_command(model, ["train", "--rules", str(file)], 0), "command": ["train", "--rules", "rules.yaml"]}


@main.command()
@_model
@click.option("--tokens", default=200_000, show_default=True)
@click.option("--force", is_flag=True)
def script(model: Path, tokens: int, force: bool) -> None:
    """A ban of Han by one command, then texts after prompts that ask for Han."""
    _once("script", force, lambda: _script(model, tokens))


def _script(model: Path, tokens: int) -> Record:
    keep, length = BUILD / "no-han", 100
    shutil.rmtree(keep, ignore_errors=True)
    words = ["train", "--script", "Han=0", "--no-eval"]
    one = train([*words, "--model", str(model)], store.cores(), keep=keep)
    proof = one.pop("record")["phrases"]["proof"]
    bank = AdapterBank(xf.load(str(model)), keep.parent)
    target = parse_rules({"goals": [{"script": "Han", "rate": 0}]}).target
    automaton = TokenAutomaton(bank.base.tokenizer, target.patterns, bank.base.vocab_size)
    arms = Arms(bank.base, automaton, (), HAN, 0, length, cache=1024)
    found = {}
    for name, count in (("before", 64), ("after", -(-tokens // length))):
        texts = arms.draw(0, count)
        found[name] = {"tokens": texts.ids.numel(), "characters": int(texts.counts(arms.automaton).sum())}
        bank.load(str(keep))
        bank.use(str(keep))
    return {"command": words, **one, "proof": proof, "before": found["before"], **found["after"]}


@main.command()
@_model
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=True)
@click.option("--count", default=200, show_default=True, help="Words.")
@click.option("--force", is_flag=True)
def like(model: Path, text: Path, count: int, force: bool) -> None:
    """The novel's most frequent words of six letters and more, as often as there."""
    _once("like", force, lambda: _like(model, text, count))


def _like(model: Path, text: Path, count: int) -> Record:
    words = Counter(re.findall(r"\b[a-z]{6,}\b", text.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "words.txt"
        file.write_text("\n".join(word for word, _ in words.most_common(count)))
        given = ["train", "--phrases", str(file), "--rates-from", str(text)]
        record = _command(model, given, 0)
    return {**record, "command": ["train", "--phrases", "words.txt", "--rates-from", "NOVEL"]}


@main.command()
@click.option("--tokenizer", "folders", type=_FOLDER, multiple=True, required=True)
@click.option("--sequences", default=1_000_000, show_default=True, help="Of all tokenizers together.")
@click.option("--force", is_flag=True)
def matches(folders: tuple[Path, ...], sequences: int, force: bool) -> None:
    """Random token sequences, half of their tokens pieces of patterns: counts of the automaton and of `re`."""
    _once("matches", force, lambda: {"tokenizers": [_matches(folder, sequences // len(folders)) for folder in folders]})


def _matches(folder: Path, sequences: int) -> Record:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = Pattern("*ing"), Pattern("the the"), Pattern("—", "char"), Pattern("Han", "script")
    patterns = (*overused()[::6], *own)
    automaton, generator = TokenAutomaton(tokenizer, patterns, len(tokenizer)), np.random.default_rng(0)
    pieces = [
        i for p in patterns for text in (p.body, f" {p.body}", p.body.upper()) for i in tokenizer(text)["input_ids"]
    ]
    known = np.array(list(automaton.bytes))
    pools, left, differ, found_in_all = (np.array([i for i in pieces if i in automaton.bytes]), known), sequences, 0, 0
    while left > 0:
        size = min(BLOCK, left), 12
        drawn = np.where(generator.random(size) < 0.7, *(generator.choice(pool, size) for pool in pools)).tolist()
        expected = _counted_by_re(patterns, [b"".join(automaton.bytes[i] for i in ids) for ids in drawn])
        found_in_all += int(expected.sum())
        differ += sum((automaton.counts(ids) != row).any() for ids, row in zip(drawn, expected, strict=True))
        left -= BLOCK
    return {"vocabulary": len(tokenizer), "sequences": sequences, "matches": found_in_all, "differ": int(differ)}


def _counted_by_re(patterns: tuple[Pattern, ...], raw: list[bytes]) -> np.ndarray:
    """Occurrences in each text, (N, K): found in all of them at once, with a character between that joins nothing."""
    texts = [one.decode("utf-8", "replace") for one in raw]
    ends, whole = np.cumsum([len(text) + 1 for text in texts]), "\x00".join(texts)
    counts = np.zeros((len(texts), len(patterns)), dtype=np.int64)
    for number, pattern in enumerate(patterns):
        begins = [begin for begin, _ in found(pattern, whole)]
        np.add.at(counts[:, number], np.searchsorted(ends, begins, side="right"), 1)
    return counts


ARMS = {
    "unslop": "`xfactor unslop`", "exact": "exact, by rejection", "ban_of_completion": "ban of completing tokens",
    "ban_of_first": "ban of first tokens", "preference": "preference pairs",
}  # fmt: skip


def table(folder: Path) -> Table:
    """Arms beside each other, means over seeds with intervals."""
    rows, every = [], store.read_all(folder)
    for arm, label in (("base", "the base"), *ARMS.items()):
        file, end = ("unslop", "_before") if arm == "base" else (arm, "")
        records = [record for record in every if record["name"].startswith(f"{file}-seed")]
        if not records:
            continue
        rate, variety = (_mean(records, f"{key}{end}") for key in ("per_1000_words", "distinct_2"))
        kl = NONE if arm == "base" else _mean(records, "kl")
        prose = _mean(records, f"prose{end}")
        timed = [r["seconds"] for r in records if arm == "unslop" and r["hardware"]["threads"] > 1]  # on both cores
        peaks = [r["peak"] for r in records if arm == "unslop"]
        whole = [f"{median(values):,.0f}" if values else NONE for values in (timed, peaks)]
        rows.append([label, rate, kl, variety, prose, *whole, str(len(records))])
    headers = ["", "in 1,000 words", "KL, nats a token", "distinct-2", "perplexity of prose", "s", "MiB", "seeds"]
    return Table(headers, rows)


def _mean(records: list[Record], key: str) -> str:
    values = [r[key] for r in records if key in r]
    if not values:
        return NONE
    found = over_seeds(values)
    digits = 4 if key == "kl" else 3 if key.startswith("distinct") else 2
    span = "" if len(values) < 2 else f" ({max(0.0, found.low):.{digits}f}–{found.high:.{digits}f})"
    return f"{found.mean:.{digits}f}{span}"


def others(folder: Path) -> Table:
    """The commands that stand alone, and the automaton against `re`."""
    rows = []
    for record in store.read_all(folder):
        figures = f"{record.get('seconds', 0):,.0f} s, {record.get('peak', 0):,.0f} MiB"
        command = f"`xfactor {' '.join(record.get('command', []))}`"
        if record["name"].startswith("rate-"):
            found = record["per_1000_words"] / max(1e-9, record["per_1000_words_before"])
            low, high = (end / max(1e-9, record["per_1000_words_before"]) for end in record["interval"])
            rows.append([command, f"wanted {record['wanted']}", f"x{found:.2f} (x{low:.2f}–x{high:.2f})", figures])
        elif record["name"] == "script":
            before = record["before"]
            found = f"{record['characters']} characters in {record['tokens']:,} tokens"
            rows.append([command, f"0; {before['characters']} in {before['tokens']:,} before", found, figures])
        elif record["name"] == "matches":
            every = record["tokenizers"]
            sequences, matches, differ = (sum(one[key] for one in every) for key in ("sequences", "matches", "differ"))
            found = f"{differ} of {sequences:,} differ, {matches:,} matches"
            rows.append([f"automaton against `re`, {len(every)} tokenizers", "equal counts", found, NONE])
    return Table(["command", "wanted", "found", "whole command"], rows)


def write(folder: Path) -> str:
    """Write both tables of the records in `folder` beside them, and return them."""
    alone = others(folder)
    parts = [table(folder).markdown(), alone.markdown(aligned=False) if alone.rows else ""]
    return store.write_text(folder / "table.md", "\n\n".join(filter(None, parts)) + "\n")


@main.command()
def report() -> None:
    """Tables of all records."""
    click.echo(write(FOLDER))


if __name__ == "__main__":
    main()
