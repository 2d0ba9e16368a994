"""The house: packages import only from packages before them, no file is in a circle, the root stays small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xfactor_peft

PACKAGE = Path(xfactor_peft.__file__).parent
ORDER = (
    "errors", "options", "progress", "lowmem", "tokens", "checkpoint", "base", "lora", "objective", "adapters",
    "sampling", "budget", "training", "phrases", "bank", "runs", "export", "playground", "cli",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions and for type checkers too."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {source}
    return (found & MODULES.keys()) - {name, "xfactor_peft"}


def layer(name: str) -> str:
    return name.split(".")[1]


def test_imports_run_one_way():
    names = [name for name in MODULES if name != "xfactor_peft"]
    assert {layer(name) for name in names} == set(ORDER)
    wrong = [
        f"{name} -> {other}"
        for name in names
        for other in imports(name)
        if ORDER.index(layer(other)) > ORDER.index(layer(name))
    ]
    assert not wrong


def test_no_file_is_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(imports(name)):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_the_root_is_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert not {"train", "load", "evaluate"} & {path.name for path in PACKAGE.iterdir()}  # public functions


def test_functions_are_small():
    """At most eight parameters and sixty lines."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
                assert count <= 8, f"{name}.{node.name} has {count} parameters"
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_errors_of_the_library_name_fields_not_flags():
    """`cli/flags.py` maps them; another program's flags may be named."""
    for name in (name for name in MODULES if ".cli" not in name):
        for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", ast.unparse(node.exc))
                assert set(flags) <= {"--config_file"}, f"{name}: {flags}"


def imported(code: str) -> set[str]:
    """The modules that are there once a fresh interpreter has run `code`."""
    words = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", ["xfactor_peft", "xfactor_peft.cli"])
def test_nothing_heavy_is_imported_before_it_is_used(name):
    assert not {"torch", "transformers", "peft", "accelerate", "rich"} & imported(f"import {name}")


def test_reading_an_adapter_folder_takes_few_modules():
    found = imported("from xfactor_peft.adapters.adapter import read_adapter")
    assert sum(name.startswith("xfactor_peft") for name in found) <= 20


ADAPTERS = str(PACKAGE.parent / "adapters")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokens", "--model", "demo"], "vocabulary:"),
        (["adapters", "list", "--adapters-dir", ADAPTERS], "demo-rate"),
    ],
)
def test_what_loads_no_model_imports_nothing_that_does(words, said):
    found = imported(f"from xfactor_peft.cli import main; main({words}, standalone_mode=False)")
    assert not {"xfactor_peft.base.loading", "transformers.modeling_utils", "peft"} & found
    assert said in found  # it did its work
