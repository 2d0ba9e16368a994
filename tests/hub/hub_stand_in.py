"""A stand-in of the Hugging Face Hub on loopback, for tests of everything that downloads.

    with HubStandIn({"owner/name": folder}) as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        assert "/owner/name/resolve/main/config.json" in hub.paths("HEAD")

It answers what huggingface_hub and `from_pretrained` ask: HEAD and GET of /{repo}/resolve/{revision}/{file}
(ranges included), /api/models/{repo} and its tree, and what `upload_folder` sends (see `hub_uploads`). Large
files are reached through a redirect to a second port, as they lie on another host on the Hub. Refusals carry
the X-Error-Code that the client understands.

Nothing leaves the machine: `environment` names the stand-in as the proxy for every other address, which it
refuses and lists in `hub.strays`.
"""

from __future__ import annotations

import fnmatch
import os
import re
import threading
from pathlib import Path
from typing import Any

from tests.hub.hub_repo import Repo
from tests.hub.hub_server import Fault, HubServer, Request
from tests.hub.hub_uploads import Uploads

FOREIGN_VARIABLES = re.compile(r"^(HF_|HUGGING|TRANSFORMERS_|.*_proxy$)", re.IGNORECASE)


class HubStandIn:
    """Serves folders as model repositories while the `with` block lasts.

    Attributes:
        url: the endpoint, http://127.0.0.1:PORT.
        requests: every request to the endpoint and to the large-file storage, in order of arrival.
        strays: requests that were meant for other hosts; tests assert that there are none.
    """

    def __init__(self, repos: dict[str, Path] | None = None) -> None:
        self.requests: list[Request] = []
        self.strays: list[str] = []
        self.repos: dict[str, Repo] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self.uploads = Uploads(self)
        self._servers = [HubServer(self), HubServer(self)]
        self.url, self.storage_url = (server.url for server in self._servers)
        for name, folder in (repos or {}).items():
            self.add(name, folder)

    def __enter__(self) -> HubStandIn:
        for server in self._servers:
            server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: from now on connections are refused, as with an unreachable Hub."""
        if not self.closing.is_set():
            self.closing.set()
            for server in self._servers:
                server.stop()
            self.uploads.close()

    def add(self, name: str, folder: Path, revisions: tuple[str, ...] = ("main",)) -> None:
        """Serve `folder` as the repository `name`, in place of an earlier one of that name."""
        self.repos[name] = Repo(name, Path(folder), revisions)

    def fail(self, path: str, **fault: Any) -> None:
        """Make matching requests fail; the arguments are the fields of `Fault`. The latest match counts."""
        self._faults.insert(0, Fault(path, **fault))

    def gate(self, name: str) -> None:
        """Make `name` a gated repository: its description is public, its files are not."""
        message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
        self.fail(f"/{name}/resolve/*", status=401, code="GatedRepo", message=message)

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def paths(self, method: str | None = None) -> list[str]:
        """The paths asked for so far, of all requests or of those with one method."""
        return [request.path for request in self.requests if method in (None, request.method)]

    def commit(self, name: str) -> str:
        """The commit id that `main` of a repository resolves to."""
        return self.repos[name].commit

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Variables for a subprocess: this one's, the Hub at this stand-in, caches in `cache`, no token.

        Proxy settings lead every other address back here, see `strays`.
        """
        kept = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLES.match(name)}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
        }
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), self.url)
        return {**kept, **ours, **proxies, **more}

    def fault(self, method: str, path: str, *, cuts: bool) -> Fault | None:
        """The fault to apply now, counted; one that cuts a file off waits until a file is sent."""
        with self._lock:
            for fault in self._faults:
                matches = method in fault.methods and fnmatch.fnmatchcase(path, fault.path)
                applies = matches and fault.times != 0
                if applies and (fault.cut_after is not None) == cuts:
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None
