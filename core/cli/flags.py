"""Command-line flags made from the fields of `RunConfig`, so that the two can never differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..config import RunConfig, field_types
from ..errors import ConfigError


def config_command(action: Callable[..., None]) -> Callable[..., None]:
    """A function with one parameter for each field (None where the flag was not given), plus `config` and `show_config`."""

    def command(**values: Any) -> None:
        values["columns"] = _pairs(values.get("columns"))
        values["plugins"] = [] if values.pop("no_plugins") else values.get("plugins") or None
        action(**values)

    types = field_types()
    parameters = [
        _parameter("config", Annotated[Path | None, typer.Argument(help="YAML file with these options as keys (dashes as underscores).")]),
        *(_parameter(entry.name, _flag(entry, types[entry.name])) for entry in fields(RunConfig)),
        _parameter("no_plugins", Annotated[bool, typer.Option("--no-plugins", help="Use no plugins but Burnish's own.")], False),
        _parameter("show_config", Annotated[bool, typer.Option("--show-config", help="Print the whole config as YAML and stop.")], False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(entry: Any, hint: Any) -> Any:
    about = entry.metadata["help"]
    if entry.default is not MISSING and entry.default is not None:
        about = f"{about} [{_shown(entry.default)}]"
    names = [f"--{entry.name.replace('_', '-')}"]
    kind = _plain(hint)
    if kind is bool:
        names[0] = f"{names[0]}/--no-{entry.name.replace('_', '-')}"
    if get_origin(kind) is Literal:
        about = f"{about} ({', '.join(get_args(kind))})"
        kind = str
    elif get_origin(kind) in (list, dict):
        kind = list[str]
    return Annotated[kind | None, typer.Option(*names, help=about, show_default=False)]


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _plain(hint: Any) -> Any:
    """The type without None."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    return parts[0] if len(parts) == 1 and NoneType in get_args(hint) else hint


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = {}
    for item in given:
        role, equals, column = item.partition("=")
        if not equals or not role or not column:
            raise ConfigError(f"{item!r} is not ROLE=COLUMN", where="--columns", fix="Write for instance --columns anchor=question")
        pairs[role] = column
    return pairs
