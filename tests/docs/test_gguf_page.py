"""docs/gguf.md with the real file: every command as printed, where `python tools/real_model.py` has fetched it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "build" / "smollm2" / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FOREIGN = ("llama-cli", "python")
"""What is not this package's: the tool's download, and a program that wheels do not carry."""


@pytest.mark.skipif(not FILE.is_file(), reason="no real GGUF file: run `python tools/real_model.py`")
@pytest.mark.skipif(not os.environ.get("XFACTOR_ALL_DOCS"), reason="takes minutes: run `make docs`")
def test_the_page_does_what_it_prints(tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    pytest.importorskip("xllamacpp", reason="the extra serve is not installed")
    (tmp_path / "build" / "smollm2").mkdir(parents=True)
    (tmp_path / "build" / "smollm2" / "gguf").symlink_to(FILE.parent)
    page, server, done = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8"), None, []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    try:
        for line in "".join(re.findall(r"^```sh\n(.*?)^```$", page, flags=re.M | re.S)).splitlines():
            words = shlex.split(line, comments=True)
            if words[0] in FOREIGN:
                continue
            done.append(words[1] if words[0] == "xfactor" else words[0])
            if words[0] == "curl":
                call = urllib.request.Request(words[1], words[-1].encode(), {"Content-Type": "application/json"})
                with urllib.request.urlopen(call, timeout=60) as answer:
                    assert json.load(answer)["choices"][0]["message"]["content"]
                continue
            command = [sys.executable, str(ROOT / "cli.py"), *words[1:]]
            if words[1] == "serve":
                server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
                seen = [server.stdout.readline()]
                while not seen[-1].startswith("curl "):
                    assert server.poll() is None
                    seen.append(server.stdout.readline())
                assert "http://127.0.0.1:8080/v1" in "".join(seen)
                continue
            made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stderr
        assert server is not None
        server.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert server.wait(timeout=30) == 0
        assert time.monotonic() - started < 20
    finally:
        if server is not None:
            server.kill()
    assert done == ["train", "export", "serve", "curl", "export", "export", "export"]
    assert (tmp_path / "x-ollama" / "Modelfile").is_file()
    untouched = (tmp_path / "x-merged-same.gguf").stat().st_size
    assert untouched == FILE.stat().st_size < (tmp_path / "x-merged.gguf").stat().st_size
