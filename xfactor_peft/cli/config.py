"""`--config`: options from a YAML file; and the file in a run's folder that repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import XFactorError
from .common import Command
from .help import did_you_mean

if TYPE_CHECKING:
    from ..base.resolve import ModelChoice

RUN = "run.yaml"
_NOT_KEPT = ("resume", "force", "push_to_hub")
"""Not part of what is repeated: how the run was begun, and what was done with it afterwards."""


def config_option(function: Command) -> Command:
    """--config."""
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(
        "--config", type=path, is_eager=True, expose_value=False, callback=_read, metavar="FILE",
        help=f"Options from a YAML file, such as the {RUN} of a run; those on the command line win.",
    )(function)  # fmt: skip


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave this option, on the command line or in a file."""
    return ctx.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)


def write_run(ctx: click.Context, flags: dict[str, Any], choice: ModelChoice, output: Path) -> None:
    """Write into `output` every option of the run that has a value, the model by the name and revision it resolved to.

    `xfactor train --config OUTPUT/run.yaml --force` gives the same bytes on the same machine.
    """
    import yaml

    from ..checkpoint.durable import write_atomically

    values = {**flags, "model": choice.name, "revision": choice.revision, "output": output}
    kept = {
        _key(param): _plain(values[param.name])
        for param in _options(ctx.command)
        if param.name not in _NOT_KEPT and _has_value(values.get(param.name))
    }
    head = f"# Repeats this run: xfactor {ctx.command.name} --config {output / RUN} --output ANOTHER_FOLDER\n"
    text = head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    write_atomically(output / RUN, text.encode())


def _options(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option) and param.expose_value]


def _key(param: click.Option) -> str:
    """The option's name in a file: its long flag without the dashes."""
    return max(param.opts, key=len).lstrip("-")


def _has_value(value: Any) -> bool:
    return value is not None and value is not False and value != ()  # 0 is one: a wanted rate of 0 means never


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise XFactorError(f"--config {path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise XFactorError(f"--config {path} must hold lines such as `steps: 100`")
    known = {_key(param): param for param in _options(ctx.command)}
    ctx.default_map = {}
    for key, value in values.items():
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise XFactorError(f"--config {path}: `{ctx.command.name}` has no option {key!r}.{hint}")
        if value is not None:
            ctx.default_map[str(known[key].name)] = _checked(value, known[key], f"--config {path}: {key}")


def _checked(value: Any, param: click.Option, where: str) -> Any:
    """The value in the shape click takes it in; YAML makes `no` false and 10 a number where a text may be meant."""
    if param.multiple:
        parts = value if isinstance(value, list) else [value]
        return tuple(_one(part, param, where) for part in parts)
    return _one(value, param, where)


def _one(value: Any, param: click.Option, where: str) -> Any:
    if isinstance(value, list | dict):
        raise XFactorError(f"{where} takes one value; got {value!r}")
    if param.is_flag != isinstance(value, bool):
        wanted = "true or false" if param.is_flag else "a value; put a text in quotes"
        raise XFactorError(f"{where} takes {wanted}; got {value!r}")
    if param.type is click.STRING and not isinstance(value, str):
        raise XFactorError(f"{where} takes a text; put it in quotes: {str(value)!r}")
    return value
