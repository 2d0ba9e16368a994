"""Thousands of damaged and hostile adapters: each is refused in one line or loads, and the model stays as it was.

    python benchmarks/fuzz_adapters.py --inputs 10000 --seed 0 --json benchmarks/results/reliability/fuzz_adapters.json

A tiny random model carries one good adapter at a scale of 0.7. Every input is a copy of another good adapter with one
to three mutations of its bytes, its JSON or its tensors. Counted are refusals by message and loads; all else (another
exception, more than `--seconds` for one input, a weight or an active adapter that changed, a file outside the input's
folder written to) is printed with the input's seed and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.catalogue import catalogue, facts
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

FILES = ("adapter_model.safetensors", "adapter_config.json", "xfactor.json")
HOSTILE = (
    None, True, False, 0, -1, 1, 8, 10**9, 10**30, 2**63, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "(a+)+$", "(.*)*b", "\x00", "LORA", "IA3", "pissa", "os", [], [1], ["c_attn"], ["../x"], [[]], {},
    {"a": 1}, {"(a+)+$": 8}, {"^transformer": 10**9}, "a" * 100_000, list(range(1000)), [None], "é☃",
)  # fmt: skip
KEYS = (
    "modules_to_save", "layer_replication", "megatron_config", "megatron_core", "target_parameters", "auto_mapping",
    "trainable_token_indices", "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "loftq_config",
    "init_lora_weights", "exclude_modules", "layers_pattern", "layers_to_transform", "runtime_config", "no_such_key",
)  # fmt: skip


def mutate_bytes(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = dice.randrange(6)
    if kind == 0:
        del data[dice.randrange(len(data) + 1) :]
    elif kind == 1 and data:
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 2:
        at = dice.randrange(len(data) + 1)
        data[at:at] = dice.randbytes(dice.randint(1, 64))
    elif kind == 3:
        data[:8] = struct.pack(
            "<Q", dice.choice([0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8])
        )
    elif kind == 4 and data:
        first, second = sorted(dice.randrange(len(data)) for _ in range(2))
        data[first:second] = dice.randbytes(dice.randint(0, second - first))
    else:
        data = bytearray(dice.randbytes(dice.randint(0, 200)))
    path.write_bytes(data)


def mutate_json(path: Path, dice: random.Random) -> None:
    if dice.random() < 0.05:
        depth = dice.choice([50, 1000, 100_000])
        path.write_text('{"peft_type": ' + "[" * depth + "]" * depth + "}")
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    places = list(_places(value))
    if dice.random() < 0.2 or not places:
        if isinstance(value, dict):
            value[dice.choice(KEYS)] = dice.choice(HOSTILE)
    else:
        parent, key = dice.choice(places)
        if dice.random() < 0.2:
            del parent[key]
        else:
            parent[key] = dice.choice(HOSTILE)
    path.write_text(json.dumps(value), encoding="utf-8")


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        yield value, key
        yield from _places(part)


def mutate_tensors(path: Path, dice: random.Random) -> None:
    try:
        tensors = load_file(path)
    except Exception:
        return
    if not tensors:
        return
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    kind = dice.randrange(8)
    if kind == 0:
        tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([float("nan"), float("inf"), -float("inf")])
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[
            dice.choice(["../x", "a", name + ".x", name.replace("h.0", "h.9"), "base_model.model..lora_A.weight"])
        ] = tensor.clone()
    elif kind == 3:
        tensors[name] = torch.zeros([dice.randint(0, 9) for _ in range(dice.randint(0, 4))])
    elif kind == 4:
        tensors[name] = tensor.to(dice.choice([torch.int8, torch.int64, torch.float16, torch.float64, torch.bool]))
    elif kind == 5:
        tensors[name] = tensor.T.contiguous()
    elif kind == 6:
        tensors[name] = torch.cat([tensor, tensor])
    else:
        tensors[dice.choice(sorted(tensors))] = tensors.pop(name)
    save_file(tensors, path)


def mutate_folder(path: Path, dice: random.Random) -> None:
    kind = dice.randrange(5)
    outside = path.parent.parent / "outside" / path.name
    path.unlink()
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path)
    elif path.suffix == ".safetensors":
        torch.save({"a": torch.zeros(1)}, path.with_name("adapter_model.bin"))


def mutate(folder: Path, seed: int) -> None:
    """One to three mutations; in two of three inputs the recorded hashes are taken out, so that deeper checks speak."""
    dice = random.Random(seed)
    if dice.random() < 0.66:
        record = json.loads((folder / "xfactor.json").read_text())
        record.pop("sha256")
        (folder / "xfactor.json").write_text(json.dumps(record))
    if dice.random() < 0.2:
        (folder / "xfactor.json").unlink()
    for _ in range(dice.randint(1, 3)):
        path = folder / dice.choice(FILES)
        if not path.is_file() or path.is_symlink():
            continue
        choices = [mutate_bytes, mutate_bytes, mutate_folder]
        choices += [mutate_tensors] * 4 if path.suffix == ".safetensors" else [mutate_json] * 5
        dice.choice(choices)(path, dice)


def fingerprint(bank: AdapterBank) -> str:
    """Every weight, the modules' names and kinds, and what is active."""
    digest = hashlib.sha256(repr((bank.active, sorted(bank.adapters))).encode())
    for name, module in bank.base.model.named_modules():
        digest.update(f"{name} {type(module).__name__}".encode())
    for name, value in bank.base.model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def prepare(work: Path) -> AdapterBank:
    """A model with one good adapter active, and another to mutate in `work/good` and `work/outside`."""
    model = str(tiny_model_folder("gpt2", work / "model"))
    evaluation = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=4))
    for name in ("kept", "good"):
        base = load_base(resolve_model(model), LoadOptions("fp32"))
        target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
        train_to_folder(
            base, target, work / name, Recipe(TrainOptions(steps=2, seq_len=8), LoraOptions(r=4), evaluation)
        )
    shutil.copytree(work / "good", work / "outside")
    bank = AdapterBank(load_base(resolve_model(model), LoadOptions("fp32")), work)
    bank.load("kept")
    bank.use("kept", 0.7)
    return bank


def one_input(bank: AdapterBank, work: Path, seed: int, written: list[str]) -> str:
    """What became of one input: "loaded", or the refusal without its paths and numbers."""
    folder = work / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "good", folder)
    mutate(folder, seed)
    catalogue_of = work / "catalogue"
    catalogue_of.mkdir(exist_ok=True)
    written.clear()
    try:
        info = bank.load(str(folder))
        facts(info)
        try:
            bank.token_set(str(folder))
        finally:
            bank.unload(str(folder))
        outcome = "loaded"
    except XFactorError as error:
        outcome = str(error)
    if seed % 10 == 0:
        (catalogue_of / "input").symlink_to(folder)
        catalogue(catalogue_of)
        (catalogue_of / "input").unlink()
    if written:
        raise AssertionError(f"written to: {written}")
    return outcome


def kind_of(message: str) -> str:
    """A refusal without what differs from input to input."""
    text = re.sub(r"\S*/\S+|'[^']*'|\"[^\"]*\"|[\d.]+", "_", message)
    return " ".join(text.split())[:70]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20, help="most that one input may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    written: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bank = prepare(work)
        before, outside = fingerprint(bank), _digest_of(work / "outside")

        def watch(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
                written.append(str(arguments[0]))

        sys.addaudithook(watch)
        signal.signal(signal.SIGALRM, _too_long)
        outcomes, failures, slowest, started = Counter(), [], 0.0, time.perf_counter()
        for index in range(options.inputs):
            seed = options.seed * 1_000_003 + index
            signal.alarm(options.seconds)
            begun = time.perf_counter()
            try:
                outcomes[kind_of(one_input(bank, work, seed, written))] += 1
                if index % 20 == 0 or index == options.inputs - 1:
                    assert fingerprint(bank) == before, "the model changed"
            except Exception as error:
                failures.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:300]})
                print(f"seed {seed}: {type(error).__name__}: {error}"[:300], flush=True)
                if fingerprint(bank) != before:
                    print("the model is not as it was; stopping")
                    break
            finally:
                signal.alarm(0)
                slowest = max(slowest, time.perf_counter() - begun)
        if _digest_of(work / "outside") != outside:
            failures.append({"error": "a file outside of the input's folder changed"})
    result = {
        "inputs": sum(outcomes.values()) + len(failures), "seed": options.seed, "loaded": outcomes["loaded"],
        "refused": sum(outcomes.values()) - outcomes["loaded"], "failures": failures, "slowest_s": round(slowest, 2),
        "seconds": round(time.perf_counter() - started, 1), "kinds": dict(outcomes.most_common()),
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(
        {key: value for key, value in result.items() if key not in ("kinds", "failures")}, f"{len(failures)} failures"
    )
    return 1 if failures else 0


def _too_long(*_: object) -> None:
    raise TimeoutError("an input took too long")


def _digest_of(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
