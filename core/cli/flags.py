"""Command-line flags made from the fields of `RunConfig`, so that the two can never differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..config import MACHINE, RESULTS, Option, RunConfig, described
from ..errors import ConfigError


def config_command(action: Callable[..., None]) -> Callable[..., None]:
    """A function with a parameter for each field (None where the flag was not given), plus `config`, `show_config`."""

    def command(**values: Any) -> None:
        values["columns"] = _pairs(values.get("columns"))
        named = values.get("plugins") or None
        if values.pop("no_plugins"):
            if named:
                raise ConfigError("both are given", where="--plugins, --no-plugins", fix="Pass one of them")
            named = []
        action(**{**values, "plugins": named})

    defaults = {entry.name: entry.default for entry in fields(RunConfig)}
    flags = {name: _flag(name, hint, option, defaults[name]) for name, (hint, option) in described().items()}
    file = typer.Argument(help="YAML file with these options as keys (dashes as underscores).", show_default=False)
    own = typer.Option("--no-plugins", help="Use no plugins but Burnish's own", rich_help_panel=MACHINE)
    show = typer.Option("--show-config", help="Print the whole config as YAML and stop", rich_help_panel=RESULTS)
    parameters = [
        _parameter("config", Annotated[Path | None, file]),
        *(_parameter(name, annotation) for name, annotation in flags.items()),
        _parameter("no_plugins", Annotated[bool, own], False),
        _parameter("show_config", Annotated[bool, show], False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str, hint: Any, option: Option, default: Any) -> Any:
    about, flag, kind = option.help, name.replace("_", "-"), _plain(hint)
    declaration = f"--{flag}"
    if kind is bool:
        declaration = f"--{flag}/--no-{flag}"
    elif get_origin(kind) is Literal:
        about = f"{about} ({', '.join(get_args(kind))})"
        kind = str
    elif get_origin(kind) in (list, dict):
        kind = list[str]
    if default is not MISSING and default is not None and kind is not bool:
        about = f"{about} [{default}]"
    return Annotated[
        kind | None, typer.Option(declaration, help=about, show_default=False, rich_help_panel=option.panel)
    ]


def _plain(hint: Any) -> Any:
    """The type without None."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    return parts[0] if len(parts) == 1 and NoneType in get_args(hint) else hint


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs: dict[str, str] = {}
    for item in given:
        role, equals, column = item.partition("=")
        if not equals or not role or not column:
            fix = "Write for instance --columns anchor=question"
            raise ConfigError(f"{item!r} is not ROLE=COLUMN", where="--columns", fix=fix)
        if role in pairs:
            what = f"the role {role!r} is given twice, as {pairs[role]!r} and {column!r}"
            raise ConfigError(what, where="--columns", fix="Give each role one column")
        pairs[role] = column
    return pairs
