"""The models that a benchmark needs: made ones (random weights), and GPT-2 Medium's real weights if they can be had."""

from __future__ import annotations

import hashlib
from pathlib import Path

from xfactor_peft.base.resolve import DEFAULT_MODEL, resolve_model
from xfactor_peft.errors import XFactorError

from ..store import REPOSITORY, make_checkpoint

TINY = "tiny-random"
REAL = REPOSITORY / "build" / "smollm2"
CACHE = REPOSITORY / "benchmarks" / ".cache"


def made_checkpoint(shape: str, tokenizer: Path, cache: Path = CACHE) -> str:
    """A folder with random weights of this shape, made once for each tokenizer; the cache ignores itself in git.

    Raises:
        XFactorError: it cannot be made.
    """
    vocabulary = tokenizer / "tokenizer.json"
    if not vocabulary.is_file():
        raise XFactorError(f"{tokenizer} has no tokenizer.json, which the random-weight models need; use --model demo")
    folder = cache / f"{shape}-{hashlib.sha256(vocabulary.read_bytes()).hexdigest()[:8]}"
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n", encoding="utf-8")
        make_checkpoint(folder, shape, "--tokenizer", tokenizer, "--force")
    return str(folder)


def made_models(model: str, shape: str | None) -> dict[str, str]:
    """name -> folder of every made model: the tiny one when it is asked for, and that of the shape rows."""
    tokenizer = resolve_model("demo" if model == TINY else model, offline=True).folder
    folders = {TINY: made_checkpoint("tiny", tokenizer)} if model == TINY else {}
    return folders | ({f"{shape}-shape": made_checkpoint(shape, tokenizer)} if shape else {})


def pretrained() -> dict[str, str]:
    """name -> folder of the real model that `tools/real_model.py` fetches, if it lies there."""
    return {REAL.name: str(REAL)} if (REAL / "model.safetensors").is_file() else {}


def real_weights(*, offline: bool) -> tuple[str | None, str]:
    """(GPT-2 Medium's name, where it is from), or (None, why it cannot be had)."""
    try:
        return DEFAULT_MODEL, resolve_model(DEFAULT_MODEL, offline=offline).reason
    except XFactorError as error:
        return None, str(error)
