"""GPT-2 Medium's shape on a small machine: memory and step time of this package and of the usual stack.

    python benchmarks/memory.py                 everything: parity first, then the table
    python benchmarks/memory.py --rounds 3      each arm three times, in turn; medians count

The weights are random (tools/make_checkpoint.py), which changes neither memory nor time, and the table says so. Each
run of an arm is a process of its own. First 50 steps of LoRA in bf16 and in 8 bits must follow plain fp32 LoRA with the
same seed and inputs; when they do not, nothing is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bench.provenance import provenance

from .arms import ARMS, PARITY, REFERENCE, Arm
from .table import render, summarise

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results" / "lowmem"


def run_arm(arm: Arm, checkpoint: Path, steps: int) -> dict:
    """The arm's result, or its last line of error under "error"."""
    command = [sys.executable, "-m", "lowmem.arm", json.dumps(asdict(arm)), str(checkpoint.resolve()), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        return {"arm": asdict(arm), "error": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_parity(checkpoint: Path, steps: int) -> dict[str, float]:
    """Largest relative difference of the losses from plain fp32 LoRA, by arm; exits when one is too large."""
    reference, worst = run_arm(REFERENCE, checkpoint, steps)["losses"], {}
    for arm, most in PARITY.items():
        losses = run_arm(arm, checkpoint, steps)["losses"]
        worst[arm.name] = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
        print(f"parity over {steps} steps, {arm.name}: {worst[arm.name]:.3%} of {most:.0%}", flush=True)
        if not worst[arm.name] <= most:
            raise SystemExit(f"{arm.name} does not follow plain fp32 LoRA; no figure is worth printing")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build" / "gpt2-medium-random")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="steps of each run; the first two are not timed")
    parser.add_argument("--parity-steps", type=int, default=50)
    parser.add_argument("--arms", type=lambda text: text.split(";"), help='names, separated by ";"')
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        maker = ROOT / "tools" / "make_checkpoint.py"
        subprocess.run([sys.executable, maker, options.checkpoint, "--shape", "gpt2-medium"], check=True)
    record = {**provenance(), "rounds": options.rounds, "steps": options.steps}
    record["parity"] = check_parity(options.checkpoint, options.parity_steps)
    runs: dict[str, list[dict]] = {}
    for _ in range(options.rounds):
        for arm in ARMS:
            if options.arms and arm.name not in options.arms:
                continue
            few = max(4, options.steps // 3) if arm.length > 64 or arm.method == "full" else options.steps
            result = run_arm(arm, options.checkpoint, few)
            runs.setdefault(arm.name, []).append(result)
            print(
                arm.name, result.get("error") or f"{max(result['load_peak'], result['train_peak']):.0f} MiB", flush=True
            )
    record["rows"] = summarise(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "lowmem.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / "table.md").write_text(render(record), encoding="utf-8")
    print(render(record))


if __name__ == "__main__":
    main()
