"""Two processes make the steps of one; one of them prints and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xfactor_peft.errors import XFactorError
from xfactor_peft.parallel import check_rows, own_output, own_rows, quiet_unless_first

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "docs/configs").glob("*.yaml"))
BRIEF = [
    "--steps",
    "8",
    "--seq-len",
    "16",
    "--lr",
    "1e-3",
    "--eval-tokens",
    "8",
    "--eval-repeats",
    "1",
    "--lora-r",
    "4",
]


def train(tmp_path, model, output, *launcher):
    words = [
        ROOT / "cli.py",
        "train",
        "--model",
        model,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        *BRIEF,
        "--output",
        output,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_make_the_steps_of_one(tiny_folders, tmp_path):
    model = tiny_folders["gpt2"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "docs/configs/two-cpu-processes.yaml"]
    alone = train(tmp_path, model, "alone")
    together = train(tmp_path, model, "together", *launcher)
    assert alone.count("saved to") == together.count("saved to") == 1
    assert together.count("step 8/8") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]
    records = [json.loads((tmp_path / name / "xfactor.json").read_text()) for name in ("alone", "together")]
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[1:]]
        for name in ("alone", "together")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert records[1]["after"]["rate"] == pytest.approx(records[0]["after"]["rate"], abs=0.02)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "together"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)


def test_shares_of_a_process(monkeypatch, tmp_path, capsys):
    ids = torch.arange(12).view(6, 2)
    assert torch.equal(own_rows(ids), ids)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(own_rows(ids))
        with quiet_unless_first():
            print("from", rank)
        with own_output(tmp_path / "out") as output:
            assert (output == tmp_path / "out") is (rank == "0")
            output.mkdir()
        assert output.exists() is (rank == "0")
    assert torch.equal(torch.cat(parts).sort(0).values, ids)
    assert capsys.readouterr().out == "from 0\n"
    check_rows(4)
    with pytest.raises(XFactorError, match="--batch-size 3 must be a multiple of the 2 processes"):
        check_rows(3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    names = {"two-cpu-processes": "MULTI_CPU", "deepspeed-zero2": "DEEPSPEED"}
    assert config.distributed_type.value == names.get(path.stem, "MULTI_GPU")
    assert config.num_processes % config.num_machines == 0


def test_all_configurations_are_in_the_docs():
    page = (ROOT / "docs/parallel.md").read_text()
    assert len(CONFIGS) == 4
    for path in CONFIGS:
        assert f"docs/configs/{path.name}" in page
