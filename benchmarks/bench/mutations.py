"""Damage and malice: changes to an adapter's bytes, JSON, tensors and files, drawn from dice."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

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
HEADERS = (0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1)
DTYPES = (torch.int8, torch.int64, torch.float16, torch.float64, torch.bool)


def mutate(folder: Path, seed: int) -> None:
    """One to three mutations; in two of three inputs the recorded hashes are taken out, so that deeper checks speak."""
    dice, record = Random(seed), folder / "xfactor.json"
    if dice.random() < 0.66:
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "sha256"}))
    if dice.random() < 0.2:
        record.unlink()
    for _ in range(dice.randint(1, 3)):
        path = folder / dice.choice(FILES)
        if path.is_file() and not path.is_symlink():
            own = [_tensors] * 4 if path.suffix == ".safetensors" else [_json] * 5
            dice.choice([_bytes, _bytes, _file, *own])(path, dice)


def _bytes(path: Path, dice: Random) -> None:
    data = bytearray(path.read_bytes())
    start, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    match dice.randrange(6):
        case 0:
            del data[start:]
        case 1 if data:
            for _ in range(dice.randint(1, 4)):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case 2:
            data[start:start] = dice.randbytes(dice.randint(1, 64))
        case 3:
            data[:8] = struct.pack("<Q", dice.choice([*HEADERS, len(data), max(0, len(data) - 8)]))
        case 4:
            data[start:end] = dice.randbytes(dice.randint(0, end - start))
        case _:
            data = bytearray(dice.randbytes(dice.randint(0, 200)))
    path.write_bytes(data)


def _json(path: Path, dice: Random) -> None:
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
        places = [(value, dice.choice(KEYS))] if isinstance(value, dict) else []
    if places:
        parent, key = dice.choice(places)
        parent[key] = dice.choice(HOSTILE)
        if dice.random() < 0.2:
            del parent[key]
    path.write_text(json.dumps(value), encoding="utf-8")


def _places(value: object) -> Iterator[tuple]:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        yield value, key
        yield from _places(part)


def _tensors(path: Path, dice: Random) -> None:
    try:
        tensors = load_file(path)
        name = dice.choice(sorted(tensors))
    except Exception:  # damaged already, or empty
        return
    tensor = tensors[name]
    match dice.randrange(8):
        case 0:
            tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([float("nan"), float("inf"), -float("inf")])
        case 1:
            del tensors[name]
        case 2:
            others = ["../x", "a", f"{name}.x", name.replace("h.0", "h.9"), "base_model.model..lora_A.weight"]
            tensors[dice.choice(others)] = tensor.clone()
        case 3:
            tensors[name] = torch.zeros([dice.randint(0, 9) for _ in range(dice.randint(0, 4))])
        case 4:
            tensors[name] = tensor.to(dice.choice(DTYPES))
        case 5:
            tensors[name] = tensor.T.contiguous()
        case 6:
            tensors[name] = torch.cat([tensor, tensor])
        case _:
            tensors[dice.choice(sorted(tensors))] = tensors.pop(name)
    save_file(tensors, path)


def _file(path: Path, dice: Random) -> None:
    """Something else in the file's place: a link out of the folder, a pipe, a folder, a link to itself, a pickle."""
    path.unlink()
    match dice.randrange(5):
        case 0:
            path.symlink_to(path.parent.parent / "outside" / path.name)
        case 1:
            os.mkfifo(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path)
        case _ if path.suffix == ".safetensors":
            torch.save({"a": torch.zeros(1)}, path.with_name("adapter_model.bin"))
