"""Which model to use: the Hub, a local folder, or the bundled demo model; never one in place of another unasked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, snapshot_download

from ..checkpoint.durable import file_hash
from ..errors import XFactorError, first_line

DEFAULT_MODEL = "openai-community/gpt2-medium"
DEMO_FOLDER = Path(__file__).parent.parent / "demo_model"
_REFUSALS: dict[type[Exception], str] = {
    hub.HFValidationError: " is neither a folder nor a Hub id (owner/name)",
    hub.GatedRepoError: " is gated: accept its terms on its page, then log in with `hf auth login`",
    hub.RepositoryNotFoundError: ": no such repository on the Hub, or it is private (log in with `hf auth login`)",
    hub.RevisionNotFoundError: " has no revision {revision!r}",
    hub.RemoteEntryNotFoundError: ": the repository has no such file",
}
"""Why the Hub refuses, the most special first."""
_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[^:\\]+\.gguf)")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_NEVER = ["*/*", "consolidated*"]
"""The latter are Mistral's own files: the same weights once more, which transformers does not read."""
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
"""One of these holds the tokens of any tokenizer; the other files of one only set it up."""


@dataclass(frozen=True)
class ModelChoice:
    """A model's files on this machine: its name, where they are, which revision, and why it was chosen.

    `gguf` is the one file that holds everything, where it is one of llama.cpp's.
    """

    name: str
    folder: Path
    revision: str | None
    reason: str
    gguf: Path | None = None


def resolve_model(model: str = "auto", *, offline: bool = False, revision: str | None = None) -> ModelChoice:
    """Find a model's files, downloading them when that is allowed and needed.

    Args:
        model: "auto" (GPT-2 Medium when it can be had, else the demo model), "demo", a folder, a file FILE.gguf or a
            folder with one, a Hub id, or a file of the Hub's, OWNER/NAME:FILE.gguf.
        offline: never touch the network; only the local cache and folders count.
        revision: branch, tag or commit on the Hub.

    Raises:
        XFactorError: the model is missing, unreachable, gated, or has no safetensors; says what to do next.
    """
    if model == "demo":
        return _demo("asked for with `model=demo`")
    if model == "auto":
        return _auto(offline)
    if not model.strip():
        raise XFactorError("`model` is empty; give a Hub id such as gpt2, a folder, or demo")
    path = Path(model)
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise XFactorError(f"`model={model}` holds {len(files)} GGUF files; give one of them, such as {files[0]}")
    if files or (path.suffix == ".gguf" and path.is_file()):
        file = files[0] if files else path
        return ModelChoice(model, file.parent, None, "a local file", file)
    if path.is_dir():
        return ModelChoice(model, _checked(Path(model), model), None, "a local folder")
    if match := _HUB_FILE.fullmatch(model):
        return _gguf_from_hub(model, match["repo"], match["file"], revision, offline)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists():
        raise XFactorError(
            f"`model={model}`: no such folder; give a folder with config.json and *.safetensors, or a file FILE.gguf"
        )
    return _from_hub(model, revision, offline)


def _demo(reason: str) -> ModelChoice:
    return ModelChoice("demo", _checked(DEMO_FOLDER, "the bundled demo model"), None, reason)


def _auto(offline: bool) -> ModelChoice:
    try:
        return _from_hub(DEFAULT_MODEL, None, offline)
    except XFactorError as error:
        why = "is not in the local cache, and `offline`" if offline else f"cannot be had: {in_words(error)}"
        return _demo(f"{DEFAULT_MODEL} {why}")


def _from_hub(name: str, revision: str | None, offline: bool) -> ModelChoice:
    cached = _cached(name, revision)
    if cached is not None:
        return ModelChoice(name, cached, cached.name, "in the local cache")
    if offline:
        raise XFactorError(
            f"`model={name}` is not in the local cache and `offline` forbids the network; "
            "run once without `offline`, or use `model=demo` or a folder"
        )
    fetched = _refusing(name, revision, lambda: _snapshot(name, revision, etag_timeout=5))
    folder = _checked(fetched, name)
    for path in folder.glob("*.safetensors"):
        _check_hash(path, name)
    return ModelChoice(name, folder, folder.name, "downloaded from the Hub")


def _gguf_from_hub(model: str, repo: str, file: str, revision: str | None, offline: bool) -> ModelChoice:
    """One GGUF file of a repository, from the cache or downloaded; `revision` becomes its commit."""
    reason = "in the local cache"
    try:
        path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except (OSError, hub.HFValidationError, hub.LocalEntryNotFoundError) as error:
        if offline:
            raise XFactorError(
                f"`model={model}` is not in the local cache and `offline` forbids the network; run once without it"
            ) from error
        reason = "downloaded from the Hub"
        path = _refusing(model, revision, lambda: Path(hf_hub_download(repo, file, revision=revision, etag_timeout=5)))
        _check_hash(path, model)
    commit = path.parents[len(Path(file).parts) - 1].name
    return ModelChoice(model, path.parent, commit, reason, path)


def _snapshot(name: str, revision: str | None, **more: Any) -> Path:
    """The model's folder in the Hub's cache."""
    return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NEVER, **more))


def _cached(name: str, revision: str | None) -> Path | None:
    """The whole cached snapshot, or None when a file of it is missing: other programs fetch the weights alone."""
    try:
        folder = _checked(_snapshot(name, revision, local_files_only=True), name)
    except (OSError, hub.HFValidationError, XFactorError):
        return None
    return folder if any(any(folder.glob(pattern)) for pattern in _TOKENIZERS) else None


def _refusing(name: str, revision: str | None, fetch: Callable[[], Path]) -> Path:
    """What `fetch` downloads; raises XFactorError for what the Hub or the network has against it."""
    try:
        return fetch()
    except tuple(_REFUSALS) as error:
        reason = next(reason for kind, reason in _REFUSALS.items() if isinstance(error, kind))
        raise XFactorError(f"`model={name}`{reason.format(revision=revision)}") from error
    except Exception as error:  # the client's network errors have no common base of their own
        if not isinstance(error, OSError | hub.HfHubHTTPError) and "http" not in type(error).__module__:
            raise
        raise XFactorError(
            f"`model={name}` cannot be downloaded ({in_words(error)}); {_advice(error)}, "
            "or use `model=demo` or a local folder"
        ) from error


def in_words(error: BaseException) -> str:
    """The innermost cause's first line, the most telling of a chain of network errors, without secrets in it.

    Whole, unless it is very long: then it ends at a word, and says so.
    """
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = first_line(error)
    text = re.sub(r"^\[Errno -?\d+\] ", "", text)
    return shorten(without_secrets(text), 300, placeholder=" …").rstrip(".:,; ")


def without_secrets(text: str) -> str:
    """Text without access tokens and without the queries of addresses, which may be signed."""
    return re.sub(r"(https?://[^\s?]+)\?[^\s'\")]*", r"\1", re.sub(r"hf_\w+", "hf_...", text))


def _advice(error: BaseException) -> str:
    """What to do next, by the status that the Hub answered with."""
    status = _status(error)
    if status in (401, 403):
        return "the Hub refuses the token in use: log in again with `hf auth login`"
    if status == 429:
        return "the Hub asks to slow down: try again in a few minutes"
    if status is not None and status >= 500:
        return "the Hub is in trouble: try again later"
    return "check the connection and try again"


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _check_hash(path: Path, name: str) -> None:
    """Compare downloaded weights with the SHA-256 that the Hub gave, which is their name in its cache.

    Raises:
        XFactorError: they are others; the file is removed, so that the next try downloads it again.
    """
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) is None:
        return
    if file_hash(blob) != blob.name:
        path.unlink()
        blob.unlink()
        raise XFactorError(f"`model={name}`: {path.name} arrived damaged (wrong SHA-256) and was removed; try again")


def _checked(folder: Path, name: str) -> Path:
    """The folder, when it holds a config and every weight file that its index names."""
    if not (folder / "config.json").is_file():
        raise XFactorError(f"{name}: {folder} has no config.json, so it is not a transformers model")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            shards = [folder / str(shard) for shard in set(json.loads(index.read_text())["weight_map"].values())]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise XFactorError(f"{name}: {index} is not an index of weight files; fetch it again") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        what = f"{missing[0]} is missing" if missing else "no *.safetensors file"
        raise XFactorError(f"{name}: {what} in {folder}; pickled weights (*.bin) are not loaded, convert them first")
    return folder
