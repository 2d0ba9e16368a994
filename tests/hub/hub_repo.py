"""One repository of the local Hub stand-in: a folder seen as the Hub would describe it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

LARGE_FILES = (".safetensors", ".bin", ".h5", ".gguf", ".onnx")


class Repo:
    """The files of a folder at one commit, whose id is a hash of their names and contents.

    The folder is read once, when the first request comes; add the repository again after changing it.
    """

    def __init__(self, name: str, folder: Path, revisions: tuple[str, ...] = ("main",)) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        self.name, self.folder, self.revisions = name, folder, revisions

    @cached_property
    def files(self) -> dict[str, Path]:
        """Path inside the repository -> file on disk, sorted."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @cached_property
    def etags(self) -> dict[str, str]:
        """Path inside the repository -> ETag, as the Hub computes it."""
        return {name: _etag(path, self.is_large(name)) for name, path in self.files.items()}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.etags.items())).encode()).hexdigest()

    def is_large(self, name: str) -> bool:
        """Whether the Hub keeps the file in its large-file storage, reached through a redirect."""
        return name.endswith(LARGE_FILES)

    def has_revision(self, revision: str) -> bool:
        return revision in self.revisions or revision == self.commit

    def info(self) -> dict[str, Any]:
        """The answer of /api/models/{name}."""
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["transformers", "safetensors"],
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "createdAt": "2022-03-02T23:29:04.000Z",
            "lastModified": "2024-02-19T12:39:04.000Z",
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """The answer of /api/models/{name}/tree/{revision}/{folder}, or None for an unknown folder."""
        prefix = f"{folder}/" if folder else ""
        inside = [name for name in self.files if name.startswith(prefix)]
        if folder and not inside:
            return None
        entries, folders = [], set()
        for name in inside:
            child, _, rest = name.removeprefix(prefix).partition("/")
            if rest:
                folders.add(prefix + child)
            if not rest or recursive:
                entries.append(self._tree_entry(name))
        folder_entry = {"type": "directory", "oid": "0" * 40, "size": 0}
        return entries + [{**folder_entry, "path": path} for path in sorted(folders)]

    def _tree_entry(self, name: str) -> dict[str, Any]:
        size = self.files[name].stat().st_size
        entry = {"type": "file", "oid": self.etags[name][:40], "size": size, "path": name}
        if self.is_large(name):
            entry["lfs"] = {"oid": self.etags[name], "size": size, "pointerSize": 135}
        return entry


def _etag(path: Path, large: bool) -> str:
    """SHA-256 of a large file, git's blob id of any other; read a piece at a time."""
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
