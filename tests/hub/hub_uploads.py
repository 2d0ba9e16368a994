"""Uploads to the Hub stand-in: making repositories, preupload, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

REPO = r"(?P<repo>[^/]+/[^/]+?)"
COMMIT = re.compile(rf"^/api/models/{REPO}/commit/[^/]+$")
PREUPLOAD = re.compile(rf"^/api/models/{REPO}/preupload/[^/]+$")
BATCH = re.compile(rf"^/{REPO}\.git/info/lfs/objects/batch$")
UPLOAD = re.compile(r"^/upload/(?P<oid>[0-9a-f]{64})$")


class Uploads:
    """Keeps what clients upload in a temporary folder, and serves it from the commit on."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._folder = tempfile.TemporaryDirectory()
        self._large: dict[str, bytes] = {}

    def close(self) -> None:
        self._folder.cleanup()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The JSON to answer with, or None for an unknown address."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            (Path(self._folder.name) / name).mkdir(parents=True, exist_ok=True)
            return {"url": f"{self._hub.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if PREUPLOAD.match(path):
            large = (".safetensors", ".png")
            return {
                "files": [
                    {"path": file["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                    for file in json.loads(body)["files"]
                ]
            }  # fmt: skip
        if BATCH.match(path):
            return {
                "transfer": "basic",
                "objects": [
                    {**entry, "actions": {"upload": {"href": f"{self._hub.storage_url}/upload/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ],
            }
        if method == "PUT" and (match := UPLOAD.match(path)):
            assert hashlib.sha256(body).hexdigest() == match["oid"]
            self._large[match["oid"]] = body
            return {}
        if match := COMMIT.match(path):
            return self._commit(match["repo"], body)
        return None

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        folder = Path(self._folder.name) / name
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self._large[value["oid"]])
        self._hub.add(name, folder)
        commit = self._hub.commit(name)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self._hub.url}/{name}/commit/{commit}"}
