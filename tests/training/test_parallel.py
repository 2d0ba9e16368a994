"""Two processes make the steps of one; one of them prints and writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import TiltedTarget, UniformTarget
from xfactor_peft.options import LoraOptions, ObjectiveOptions, Recipe, TrainOptions
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.parallel import (
    check_processes,
    end_group,
    end_group_at_exit,
    own_output,
    own_rows,
    quiet_unless_first,
)
from xfactor_peft.training.sharding import check_shards

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "docs/configs").glob("*.yaml"))
BRIEF = ["--steps", "8", "--seq-len", "16", "--lr", "1e-3", "--eval-tokens", "8", "--eval-repeats", "1"]
LORA, FULL = ["--lora-r", "4"], ["--method", "full"]
LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "docs/configs/two-cpu-processes.yaml"]


JOBS = {"lora": LORA, "sharded lora": [*LORA, "--fsdp"], "full": [*FULL, "--fsdp"]}


def words_of(model, job, output):
    return ["train", "--model", model, "--dtype", "fp32", "--device", "cpu", *BRIEF, *job, "--output", output]


@pytest.fixture(scope="module")
def launched(tiny_folders, tmp_path_factory):
    """The folder of two processes that ran cli.py for each of `JOBS` and then `HALVES`, and what they printed for each.

    All in one launch: most of one is start-up.
    """
    folder, place = tmp_path_factory.mktemp("together"), tmp_path_factory.mktemp("script")
    (place / "jobs.py").write_text(RUN_JOBS + HALVES)
    jobs = {name: [str(word) for word in words_of(tiny_folders["gpt2"], job, name)] for name, job in JOBS.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *LAUNCHER, place / "jobs.py", ROOT / "cli.py", json.dumps(jobs), tiny_folders["llama"]],
        capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(JOBS)
    texts = dict(part.split("\n", 1) for part in done.stdout.split("--- ")[1:])
    return folder, texts, json.loads((place / "shares.json").read_text())


RUN_JOBS = """
import json, os, runpy, sys

cli, jobs, llama = sys.argv[1:]
for name, words in json.loads(jobs).items():
    if os.environ["RANK"] == "0":
        print("---", name, flush=True)
    sys.argv = [cli, *words]
    try:
        runpy.run_path(cli, run_name="__main__")
    except SystemExit as end:
        assert end.code in (None, 0), end.code
    sys.stdout.flush()
"""


@pytest.mark.parametrize(
    ("job", "words"),
    [("lora", LORA), ("sharded lora", LORA), ("full", FULL)],
    ids=["DDP of LoRA", "FSDP of LoRA", "FSDP of all weights"],
)
def test_two_processes_make_the_steps_of_one(tiny_folders, launched, run, tmp_path, job, words):
    folder, texts, _ = launched
    alone, together = run(*words_of(tiny_folders["gpt2"], words, "alone")).output, texts[job]
    assert alone.count("saved to") == together.count("saved to") == 1
    assert together.count("step 8/8") == 1
    outputs = [tmp_path / "alone", folder / job]
    records = [json.loads((output / "xfactor.json").read_text()) for output in outputs]
    assert [record["processes"] for record in records] == [1, 2]
    curves = [
        [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()[1:]]
        for output in outputs
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert records[1]["after"]["rate"] == pytest.approx(records[0]["after"]["rate"], abs=0.02)
    file = "adapter_model.safetensors" if words is LORA else "model.safetensors"
    one, two = (load_file(output / file) for output in outputs)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if key.endswith("c_attn.bias"):  # softmax cancels a bias of the keys: its gradient is noise, which Adam scales
            for vector in (tensor, two[key]):
                vector.chunk(3)[1].zero_()
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)


MACHINE = """
import sys
from pathlib import Path
from xfactor_peft.lowmem.imports import leave_out_bitsandbytes
leave_out_bitsandbytes()
import xfactor_peft as xf

def run(model, folder, method, fsdp):
    base = xf.load(str(model), xf.LoadOptions("fp32", "cpu"))
    tokens = xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    quick = xf.EvalOptions(("Once",), 1, xf.SamplingOptions(max_new_tokens=2))
    recipe = xf.Recipe(xf.TrainOptions(method, steps=4, seq_len=16, lr=1e-3, fsdp=fsdp), evaluation=quick)
    xf.train_to_folder(base, xf.UniformTarget(tokens), Path(folder) / method, recipe)

if __name__ == "__main__":
    run(*sys.argv[1:], "lora", False)
    run(*sys.argv[1:], "full", True)
"""


def test_two_machines_make_the_adapter_of_one(tiny_folders, tmp_path):
    """The page's configuration, launched twice over loopback: LoRA's DDP, then FSDP, in the same processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "docs/configs/two-machines.yaml").read_text()
    changes = {"192.0.2.10": "127.0.0.1", "29500": str(port), "use_cpu: false": "use_cpu: true",
               "num_processes: 8": "num_processes: 2"}  # fmt: skip
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    script = tmp_path / "machine.py"
    script.write_text(MACHINE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    launched = []
    for rank in (0, 1):
        config = tmp_path / f"machine{rank}.yaml"
        config.write_text(text.replace("machine_rank: 0", f"machine_rank: {rank}"))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, script]
        output = (tmp_path / f"output{rank}").open("wb")
        launched.append(
            subprocess.Popen([*command, tiny_folders["llama"], tmp_path / f"on{rank}"], env=environment, stderr=output)
        )
    try:
        codes = [process.wait(120) for process in launched]
    finally:
        for process in launched:
            process.kill()
    assert codes == [0, 0], "".join((tmp_path / f"output{rank}").read_text() for rank in (0, 1))
    assert not (tmp_path / "on1").exists()
    alone: dict = {"__name__": "machine"}
    exec(MACHINE, alone)
    for method, file in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        alone["run"](tiny_folders["llama"], tmp_path / "alone", method, False)
        one, two = (load_file(tmp_path / name / method / file) for name in ("alone", "on0"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=1e-4)
        assert json.loads((tmp_path / "on0" / method / "xfactor.json").read_text())["processes"] == 2


def test_each_of_two_processes_holds_half(launched):
    """Weights, gradients and moments; and what is gathered at the end is what a plain step gives."""
    _, _, shares = launched
    assert shares["before"] == shares["after"] == shares["whole"]
    for kind in ("weights", "gradients", "moments"):
        assert shares[kind] == pytest.approx(0.5 * shares["whole"], rel=0.02)
    assert shares["emptied"] == 0


HALVES = """
from pathlib import Path

import torch

from xfactor_peft.base.loading import LoadOptions, load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.training.parallel import end_group
from xfactor_peft.training.sharding import ShardedCopy

assert torch.distributed.get_world_size() == 2  # the group of the runs before
model = load_base(resolve_model(llama), LoadOptions("fp32")).model.requires_grad_(True)
count = lambda tensors: sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)
shares = {"whole": sum(p.numel() for p in model.parameters()), "before": count(model.parameters())}
sharded = ShardedCopy(model)
sharded.shard(sharded.model, torch.device("cpu"))
shares["emptied"] = sum(p.untyped_storage().nbytes() // 4 - 1 for p in model.parameters())
shares["weights"] = count(sharded.model.parameters())
optimizer = torch.optim.Adam(sharded.model.parameters())
sharded.model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
shares["gradients"] = count(p.grad for p in sharded.model.parameters())
optimizer.step()
shares["moments"] = count(state["exp_avg"] for state in optimizer.state.values())
sharded.gather()
shares["after"] = count(model.parameters())
if torch.distributed.get_rank() == 0:
    (Path(__file__).parent / "shares.json").write_text(json.dumps(shares))
end_group()
"""


def test_sharding_says_what_it_needs(monkeypatch, load_tiny):
    with pytest.raises(XFactorError, match="`optimizer` adam or adamw; got 'adam8bit'"):
        TrainOptions(fsdp=True, optimizer="adam8bit")
    sharded = TrainOptions(fsdp=True)
    with pytest.raises(XFactorError, match="needs several processes: accelerate launch"):
        check_processes(sharded)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(sharded)
    base = load_tiny()
    tokens = TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    uniform = UniformTarget(tokens)
    check_shards(base, uniform, Recipe(sharded, LoraOptions()))
    for target, lora, objective, message in [
        (uniform, LoraOptions(variant="dora"), {}, "is for plain LoRA; got `lora.variant=dora`"),
        (uniform, LoraOptions(), {"kl_to_base": 0.5}, "has no base to compare with"),
        (TiltedTarget.of(tokens, 0.1), LoraOptions(), {}, "has no base to compare with"),
    ]:
        with pytest.raises(XFactorError, match=message):
            check_shards(base, target, Recipe(sharded, lora, objective=ObjectiveOptions(**objective)))
    base.quantized = {"Int8Linear": 1}
    with pytest.raises(XFactorError, match="weights that are not quantised"):
        check_shards(base, uniform, Recipe(sharded, LoraOptions()))


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
    check_processes(TrainOptions(batch_size=4))
    with pytest.raises(XFactorError, match="`batch_size=3` must be a multiple of the 2 processes"):
        check_processes(TrainOptions(batch_size=3))


def test_the_group_ends_before_python_does(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    end_group_at_exit()
    assert registered == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    end_group_at_exit()
    assert registered == [end_group]
    end_group()  # without a group there is nothing to do
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    end_group()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.num_processes % config.num_machines == 0


def test_all_configurations_are_in_the_docs():
    page = (ROOT / "docs/parallel.md").read_text()
    assert len(CONFIGS) == 3
    for path in CONFIGS:
        assert f"docs/configs/{path.name}" in page
