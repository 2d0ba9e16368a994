"""What a process leaves out, and that it comes when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ADAPTERS = Path(__file__).parents[2] / "adapters"
COMMANDS = {
    "generate": ["--adapter", "demo-rate", "--max-new-tokens", "2"],
    "eval": ["--adapter", "demo-rate", "--repeats", "1", "--max-new-tokens", "2"],
    "play": ["--adapter", "demo-rate"],
    "tokens": ["--model", "demo", "--measure", "--max-new-tokens", "2"],
    "adapters": ["verify", "demo-rate"],
    "plan": ["--model", "demo"],
    "env": [],
}
"""Every command that loads a model or a library, and trains nothing; `train` is below."""
ONLY_USED = """
import sys
from xfactor_peft.cli import main
main(sys.argv[1:], standalone_mode=False)
names = ("bitsandbytes", "torch._dynamo.symbolic_convert", "torch._inductor")
found = {name for name in names if sys.modules.get(name)}
assert not found, found
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_neither_the_compiler_nor_bitsandbytes(name):
    """PEFT takes bitsandbytes along where it is not told not to: three seconds and 100 MiB of every command."""
    folder = ["--adapters-dir", str(ADAPTERS)] * any("demo-rate" in word for word in COMMANDS[name])
    words = [sys.executable, "-c", ONLY_USED, name, *COMMANDS[name], *folder]
    done = subprocess.run(words, capture_output=True, text=True, check=False, input="")
    assert done.returncode == 0, done.stdout + done.stderr


LEFT_OUT = """
import sys
from xfactor_peft.cli import main
try:
    main(["train", "--model", "demo", "--load-in-8bit", "--checkpointing", "on", "--steps", "1", "--seq-len", "8",
          "--no-eval", "--output", sys.argv[1]])
except SystemExit as end:
    assert end.code == 0
found = {"torch._dynamo.symbolic_convert", "torch._inductor"} & sys.modules.keys()
assert not found, found
import torch
assert torch._dynamo.is_compiling() is False
assert "torch._dynamo.symbolic_convert" in sys.modules
from torch.fx.experimental.symbolic_shapes import ShapeEnv, expect_true, sym_and, sym_eq
assert ShapeEnv.__module__ == "torch.fx.experimental.symbolic_shapes"
print(torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist())
"""


def test_a_run_does_without_the_compiler_which_comes_when_it_is_asked_for(tmp_path):
    words = [sys.executable, "-c", LEFT_OUT, str(tmp_path / "adapter")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[2.0, 2.0]"


QUANTISED = """
import sys
from xfactor_peft.cli import main
main(["train", "--model", "demo", "--load-in-4bit", "--quant-backend", "bitsandbytes", "--steps", "1", "--seq-len", "8",
      "--no-eval", "--output", sys.argv[1]], standalone_mode=False)
import torch._dynamo.utils, torch._dynamo.backends.registry, sympy.core
assert torch._dynamo.utils.__spec__.name == "torch._dynamo.utils" and sympy.core.numbers.Integer(3) + 1 == 4
assert sys.modules["torch._dynamo"].utils is torch._dynamo.utils
"""


def test_a_library_that_compiles_on_import_finds_the_compiler_whole(tmp_path):
    """bitsandbytes decorates with `torch.compile`, which begins with a submodule and not with the package."""
    words = [sys.executable, "-c", QUANTISED, str(tmp_path / "adapter")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


ANSWERS = """
from xfactor_peft.lowmem import imports
assert imports.put_off_compiler() and not imports.put_off_compiler()
import torch.fx.experimental.symbolic_shapes as late
cases = [(True,), (False,)], [(True, False), (True, True)], [(3, 3), (3, 4), ((1, 2), [1, 2]), ((1,), (1, 2))]
firsts = ("guard_or_false", "guard_or_true", "statically_known_true")
names = [*((name, cases[0]) for name in firsts), ("sym_and", cases[1]), ("sym_or", cases[1]), ("sym_eq", cases[2])]
found = [[getattr(late, name)(*case) for case in values] for name, values in names]
real = late.real()
assert real is not late and real.ShapeEnv
assert found == [[getattr(real, name)(*case) for case in values] for name, values in names], found
"""


def test_what_is_answered_in_its_place_is_what_torch_says():
    done = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
