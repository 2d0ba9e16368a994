"""Packages that only one format needs."""

from __future__ import annotations

import importlib.util

from ..errors import XFactorError


def need(package: str, extra: str) -> None:
    """Raises XFactorError with the command that installs an optional package."""
    if importlib.util.find_spec(package) is None:
        raise XFactorError(f'this format needs the package {package}: pip install "xfactor-peft[{extra}]"')
