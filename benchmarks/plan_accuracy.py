"""What a plan predicts against what a run then takes: peak memory and seconds a step, as a ratio predicted : measured.

    python benchmarks/plan_accuracy.py                      # a random model of 8 x 768, V = 20 000
    python benchmarks/plan_accuracy.py --model FOLDER --steps 30 --json benchmarks/results/plan.json

One line of JSON a case. Every case is a process of its own (a fork of this one, which has imported everything and run
nothing), as a peak is a process's. Memory is deterministic to a few per cent; the time is the median of the steps after
the first two, and a busy machine disturbs it, so it is no test's business. Exit status 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

from xfactor_peft.lowmem.imports import leave_out_bitsandbytes

leave_out_bitsandbytes()  # as the command line does, before anything imports PEFT

from xfactor_peft import (  # noqa: E402
    EvalOptions,
    LoadOptions,
    LoraOptions,
    MemoryOptions,
    SamplingOptions,
    TokenSet,
    TrainOptions,
    UniformTarget,
    load,
    train,
)
from xfactor_peft.budget.dry_run import Shape  # noqa: E402
from xfactor_peft.budget.plan import make_plan  # noqa: E402

CASES = ((None, "off"), ("int8", "on"))  # (quantisation, checkpointing)
WARM_UP = 2  # steps whose time does not count


def write_model(folder: Path) -> Path:
    """A GPT-2 of 8 x 768 and V = 20 000 with random weights: the model, not Python, decides the peak."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=20_000, n_embd=768, n_layer=8, n_head=12, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(folder: Path, quantization: str | None, checkpointing: str, steps: int, time: bool) -> dict[str, object]:
    """Plan a run, do it, and divide what was predicted by what was measured."""
    memory, shape = MemoryOptions(checkpointing), Shape("bf16", quantization, 4, 64, "lora", LoraOptions())
    plan = make_plan(folder, shape, memory, time=time)
    base = load(str(folder), LoadOptions("bf16", "cpu", quantization))
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))
    brief = EvalOptions(("Once",), 1, SamplingOptions(max_new_tokens=1))
    result = train(base, target, TrainOptions(steps=steps), LoraOptions(), brief, memory=memory)
    peak = max(base.load_peak["rss_mib"], result.train_peak["rss_mib"])
    found = {"quantization": quantization, "checkpointing": checkpointing, "peak_mib": peak,
             "memory": plan.memory.total / 2**20 / peak}  # fmt: skip
    if time:
        seconds = statistics.median(step.seconds for step in result.history[WARM_UP:])
        found |= {"seconds": seconds, "time": plan.seconds / seconds}
    return found


def in_a_fork(*arguments) -> dict[str, object] | None:
    """`compare` in a process of its own; None when it failed, which it has said itself."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writing, json.dumps(compare(*arguments)).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="A folder.  [default: a random model, made for this]")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--memory-only", action="store_true", help="Plan and compare no time.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.model
        if folder is None:
            folder = Path(name)
            if not os.fork():
                write_model(folder)
                os._exit(0)
            os.wait()
        found = []
        for case in CASES:
            found.append(in_a_fork(folder, *case, options.steps, not options.memory_only))
            if found[-1]:
                print(json.dumps(found[-1]), flush=True)
    if options.json and all(found):
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
