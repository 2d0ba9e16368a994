"""Windows has neither `fcntl` nor `resource`, macOS no /proc: nothing that loads or trains needs them."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from xfactor_peft.lowmem import memory

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
import psutil  # whose part for Linux needs `resource`; it has another one for Windows
sys.modules["fcntl"] = sys.modules["resource"] = None
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
import xfactor_peft as xf

base = xf.load(sys.argv[1], xf.LoadOptions("fp32"))
tokens = xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
quick = xf.EvalOptions(("Once",), 1, xf.SamplingOptions(max_new_tokens=2))
recipe = xf.Recipe(xf.TrainOptions(steps=2, batch_size=2, seq_len=8), evaluation=quick)
result, record = xf.train_to_folder(base, xf.UniformTarget(tokens), Path(sys.argv[2]), recipe)
assert len(result.history) == 2 and result.train_peak["rss_mib"] > 50
"""


def test_a_run_without_fcntl_and_resource(tiny_folders, tmp_path):
    command = [sys.executable, "-c", WITHOUT, tiny_folders["gpt2"], tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/xfactor.json").read_text())["trainable_parameters"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_memory_without_proc(monkeypatch):
    """The present size where there is no peak; Windows has one."""

    def absent(path, *_, **__):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "write_text", absent)
    assert memory.peak_rss() == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.1)
    assert memory.reset_peak(torch.device("cpu")) is False
    assert memory.peaks(torch.device("cpu"))["rss_mib"] > 50
