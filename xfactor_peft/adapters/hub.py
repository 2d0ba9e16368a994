"""Adapters on the Hub: push a folder with its card and curve, pull one that is checked before it takes its place."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id

from ..base.resolve import in_words, without_secrets
from ..errors import XFactorError, first_line
from .adapter import read_adapter
from .files import CARD, CONFIG, RECORD, WEIGHTS
from .output import staged

METRICS, CURVE = "metrics.jsonl", "training.png"
FILES = (CONFIG, WEIGHTS, RECORD, CARD, METRICS, CURVE)


def check_push(repo: str) -> None:
    """Raises XFactorError for a name that is no repository, or without a token: before any work is done."""
    owner, slash, name = repo.partition("/")
    if not (slash and owner and name) or "/" in name:
        raise XFactorError(f"`repo` {repo!r}: a repository is OWNER/NAME")
    try:
        validate_repo_id(repo)
    except hub.HFValidationError as error:
        raise XFactorError(f"`repo` {repo!r} is no name for a repository: {first_line(error)}") from error
    if get_token() is None:
        raise XFactorError("pushing to the Hub needs a token; log in with `hf auth login`")


def push(folder: Path, repo: str, *, private: bool | None = None) -> str:
    """Upload an adapter's folder as the repository `repo` (made if need be); returns its address.

    The card gets a curve of the training where matplotlib is installed. Nothing in `folder` changes.

    Raises:
        XFactorError: no adapter there, no token, or the Hub refuses.
    """
    check_push(repo)
    read_adapter(folder)
    contents: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, value) for name, value in (contents | _with_curve(folder)).items()]
        api.create_commit(repo, operations, commit_message=f"Adapter {folder.name}")
    except Exception as error:
        if not _from_outside(error):
            raise
        why, advice = in_words(error), "check the connection, the name and `hf auth whoami`"
        if CARD in str(error):  # the client's own words for what the Hub has against a card, one fault a line
            why, advice = without_secrets(" ".join(str(error).split())), f"correct {folder / CARD}"
        raise XFactorError(f"{repo} cannot be pushed: {why}; {advice}") from error
    return f"{api.endpoint}/{repo}"


def pull(repo: str, root: Path, name: str | None = None, *, revision: str | None = None, force: bool = False) -> Path:
    """Download an adapter into `root`/NAME; it takes its place only when it is whole. Never runs code or pickles.

    Raises:
        XFactorError: no such repository or no adapter in it, no network, or the name is taken and `force` is off.
    """
    if repo.count("/") != 1:
        raise XFactorError(f"{repo!r} is no repository on the Hub; one is OWNER/NAME")
    folder = root / (name or repo.split("/")[1])
    with staged(folder, force=force) as staging:
        try:
            found = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES), etag_timeout=5))
            for path in (found / file for file in FILES):
                if path.is_file():
                    shutil.copy(path, staging)
        except hub.RepositoryNotFoundError as error:
            raise XFactorError(f"{repo}: no such repository on the Hub, or it is private (`hf auth login`)") from error
        except Exception as error:
            if not _from_outside(error):
                raise
            why = in_words(error)
            raise XFactorError(f"{repo} cannot be pulled: {why}; check the connection and try again") from error
        if not (staging / CONFIG).is_file():
            raise XFactorError(f"{repo} holds no {CONFIG}, so it is not an adapter")
        read_adapter(staging)
    return folder


def _from_outside(error: Exception) -> bool:
    """Whether the Hub, the network or the disk is the cause: the client's network errors have no base of their own."""
    return isinstance(error, OSError | ValueError | hub.HfHubHTTPError) or "http" in type(error).__module__


def _with_curve(folder: Path) -> dict[str, bytes]:
    """A picture of metrics.jsonl, and the card with a line that shows it; nothing without matplotlib."""
    metrics, card = folder / METRICS, folder / CARD
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    if not (metrics.is_file() and card.is_file()):
        return {}
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line and "step" in line]
    figure, picture = Figure(figsize=(6, 3), layout="constrained"), io.BytesIO()
    loss = figure.subplots()
    loss.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="tab:blue")
    loss.set(xlabel="step", ylabel="KL loss, nats", ylim=(0, None))
    mass = loss.twinx()
    mass.plot([s["step"] for s in steps], [s["set_mass"] for s in steps], color="tab:orange")
    mass.set(ylabel="mass on the set", ylim=(0, 1))
    figure.savefig(picture, dpi=120, format="png")
    shown = f"\n![KL loss (blue) and mass on the set (orange) while training]({CURVE})\n"
    return {CURVE: picture.getvalue(), CARD: card.read_bytes() + shown.encode()}
