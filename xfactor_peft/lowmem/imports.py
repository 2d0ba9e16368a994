"""Keep out of a process what it imports but does not use: bitsandbytes, and torch's compiler with its algebra."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "bitsandbytes"
_COMPILER, _SHAPES = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
_FUNCTIONS, _ALGEBRA = "torch.utils._sympy.functions", "sympy"


def leave_out_bitsandbytes() -> bool:
    """Make `import bitsandbytes` fail in this process, which saves 45 MiB; call it before PEFT is imported.

    PEFT imports bitsandbytes whenever it is installed, and takes its absence well. Returns False, and changes
    nothing, when it is imported already. `allow_bitsandbytes` undoes it, but PEFT remembers what it found.
    """
    if sys.modules.get(_NAME) is not None:
        return False
    # Python's own way of marking a module that must not be imported
    sys.modules[_NAME] = None  # type: ignore[assignment]  # which typeshed does not know
    return True


def allow_bitsandbytes() -> None:
    """Undo `leave_out_bitsandbytes`."""
    if _NAME in sys.modules and sys.modules[_NAME] is None:
        del sys.modules[_NAME]


def put_off_compiler() -> bool:
    """Put off importing torch's compiler, and sympy behind its symbolic shapes: 58 MiB and a second.

    transformers and torch's optimisers import both for decorators and checks that do nothing where nothing is compiled.
    Those few are answered here; whatever else is asked for loads the real module, which then takes its place. Returns
    False, and changes nothing, when one of them is imported already.
    """
    if {_COMPILER, _SHAPES, _FUNCTIONS, _ALGEBRA} & sys.modules.keys():
        return False
    frame = ModuleType(f"{_COMPILER}.eval_frame")
    frame.OptimizedModule = type("OptimizedModule", (), {})  # type: ignore[attr-defined]  # accelerate looks for one
    marks: dict[str, Any] = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _unchanged)
    _Later(
        _COMPILER,
        ("config", "_trace_wrapped_higher_order_op"),
        **marks,
        graph_break=lambda *_, **__: None,
        eval_frame=frame,
    )
    failure = type("GuardOnDataDependentSymNode", (RuntimeError,), {})
    known: dict[str, Any] = {name: _of_plain(_SHAPES, name, answer) for name, answer in _ANSWERS.items()}
    _Later(_SHAPES, **known, GuardOnDataDependentSymNode=failure)
    _Later(_FUNCTIONS, Max=_of_plain(_FUNCTIONS, "Max", max))
    _Later(_ALGEBRA, Basic=type("Basic", (), {}))
    sys.meta_path.insert(0, _Submodules())
    return True


class _Later(ModuleType):
    """Stands in `sys.modules` for a module until something is asked of it that it does not know.

    Args:
        alone: modules of this package that are imported without it.
        known: what it answers itself.
    """

    def __init__(self, name: str, alone: tuple[str, ...] = (), **known: Any) -> None:
        super().__init__(name)
        package, *inner = name.split(".")
        spec = importlib.util.find_spec(package)
        root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
        self.__path__ = [str(root.joinpath(*inner))]
        if not inner:
            self.__spec__ = spec  # whoever asks whether the package is installed
        self.__dict__.update(known, alone=alone, _known=tuple(known))
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.alone:
            return importlib.import_module(f"{self.__name__}.{name}")
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """The module itself, loaded; from then on this one only passes on what it is asked, to whoever kept it."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
            for name in self._known:
                self.__dict__.pop(name, None)
        return importlib.import_module(self.__name__)


class _Submodules(MetaPathFinder):
    """Whoever imports a module of a package that a `_Later` stands for gets the real one, its package loaded first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        stand_in = sys.modules.get(package)
        if not isinstance(stand_in, _Later) or name in stand_in.alone:
            return None
        stand_in.real()
        return importlib.util.spec_from_loader(fullname, _Loaded(importlib.import_module(fullname)))


class _Loaded(Loader):
    """Gives a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return _unchanged if function is None else function


def _first(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _same(left: Any, right: Any) -> bool:
    return list(left) == list(right) if isinstance(left, tuple | list) else left == right


_ANSWERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "statically_known_true"), _first),
    "guard_size_oblivious": _first,
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
    "sym_eq": _same,
    "is_nested_int": lambda *_: False,
    "has_guarding_hint": lambda *_: True,
    "guarding_hint_or_throw": _first,
}
"""What these functions of symbolic shapes say of sizes and truth values that are not symbolic."""


def _of_plain(home: str, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` for numbers and sequences of them, else the real function of that name in the module `home`."""

    def plain(value: Any) -> bool:
        return all(map(plain, value)) if isinstance(value, tuple | list) else type(value) in (bool, int)

    def function(*args: Any, **kwargs: Any) -> Any:
        if all(map(plain, args)):
            return answer(*args, **kwargs)
        module = sys.modules[home]
        return getattr(module.real() if isinstance(module, _Later) else module, name)(*args, **kwargs)

    return function
