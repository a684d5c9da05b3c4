"""Writes into the pages what the code already says, so that it is said once: `python docs/generate.py`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. The tests compare each with what
this script would write (`tests/unit/test_docs.py`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def options() -> str:
    """Every key of a run's config, by panel."""
    from burnish.core.config import RunConfig, described

    defaults = {entry.name: entry for entry in fields(RunConfig)}
    panels: dict[str, list[list[str]]] = {}
    for name, (hint, option) in described().items():
        bounds = option.bounds().replace("finite", "")
        kind = f"{_words(hint)}, {bounds}" if bounds else _words(hint)
        panels.setdefault(option.panel, []).append([f"`{name}`", kind, _default(defaults[name]), option.help])
    headings = ("Key", "Type", "Default", "What it is")
    return "\n\n".join(f"### {panel}\n\n{table(headings, rows)}" for panel, rows in panels.items())


def _words(hint: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if origin in (list, dict):
        return {list: "list of texts", dict: "mapping of text to text"}[origin]
    if get_args(hint):
        return " or ".join(_words(part) for part in get_args(hint) if part is not NoneType)
    return names[hint]


def _default(entry: Any) -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "**required**"
    value = entry.default_factory() if entry.default is MISSING else entry.default
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def hooks() -> str:
    """Every hook of the contract with what it is for."""
    from burnish.core import hookspecs

    rows = []
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if not name.startswith("burnish_"):
            continue
        about = " ".join((hook.__doc__ or "").split())
        claim = re.findall(r"`\w+\.\w+`", about)[-1]
        about = re.sub(rf" (Metadata: {claim}|Claim [^.]* \({claim}\))\.$", "", about)
        order = hook.__code__.co_firstlineno
        rows.append((order, [f"`{_signature(name, hook)}`", claim, about]))
    return table(("Hook", "Claim", "What it does"), [row for _, row in sorted(rows)])


def _signature(name: str, hook: Callable[..., Any]) -> str:
    signature = inspect.signature(hook)
    result = signature.return_annotation
    return f"{name}({', '.join(signature.parameters)})" + ("" if result in (None, "None") else f" -> {result}")


def claims() -> str:
    """The kinds of claim that a distribution's metadata may hold."""
    from burnish.core.discovery import KINDS

    unknown = set(KINDS) ^ set(_CLAIMS)
    if unknown:
        raise SystemExit(f"docs/generate.py: describe the claim kinds {sorted(unknown)} in _CLAIMS")
    return table(("Claim", "What it says"), [[f"`{kind}.{_CLAIMS[kind][0]}`", _CLAIMS[kind][1]] for kind in KINDS])


_CLAIMS = {
    "contract": ("1", "The version of the contract that its plugins speak. Once a distribution; without it none runs."),
    "model_type": ("NAME", "Takes models whose config says `model_type: NAME`."),
    "fallback": ("family", "Takes models that nobody claims. It never counts as a claim."),
    "backend": ("NAME", "Offers the backend that users call `NAME`."),
    "operation": ("NAME", "Offers an implementation of the operation `NAME`."),
    "exporter": ("TARGET", "Offers `burnish export --target TARGET`."),
    "command": ("NAME", "Offers the command `burnish NAME`."),
    "observer": ("EVENT", "Wants to be told of `model_loaded`, `step_finished` or `model_saved`."),
    "device": ("NAME", "For the reader: a device it is made for."),
    "dtype": ("NAME", "For the reader: a dtype it is made for."),
    "attention": ("NAME", "For the reader: an attention it brings or needs."),
}  # fmt: skip


def commands() -> str:
    """Every command of the program with its arguments and options."""
    import typer.main

    from burnish.core.cli.app import app

    return "\n\n".join(_command(command, path) for path, command in _walk(typer.main.get_command(app), "burnish"))


def _walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(child, f"{path} {name}")


def _command(command: Any, path: str) -> str:
    from burnish.core.config import RunConfig

    keys = {entry.name for entry in fields(RunConfig)} if path == "burnish train" else set()
    parameters = [parameter for parameter in command.params if parameter.name not in (*keys, "help")]
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    flags = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    usage = [path, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if flags or keys else [])]
    usage += ["COMMAND [ARGS]"] if getattr(command, "commands", None) else []
    parts = [f"### {path}", f"```text\n{' '.join(usage)}\n```", inspect.cleandoc(command.help or "")]
    rows = [[f"`{_metavar(argument)}`", "", argument.help or ""] for argument in arguments]
    rows += [[_names(flag), _flag_default(flag), flag.help or ""] for flag in flags]
    if rows:
        parts.append(table(("Argument or option", "Default", "What it is"), rows))
    if keys:
        parts.append(
            "Every key of [the training options](training.md#every-option) is an option too, with dashes in place of "
            "underscores: `batch_size` is `--batch-size`. A key that is true or false has two: `--overwrite` and "
            "`--no-overwrite`."
        )
    if command.epilog:
        parts.append(command.epilog)
    return "\n\n".join(part for part in parts if part)


def _metavar(argument: Any) -> str:
    name = str(argument.name).upper()
    return name if argument.required else f"[{name}]"


def _names(flag: Any) -> str:
    names = [*flag.opts, *flag.secondary_opts]
    return " / ".join(f"`{name}`" for name in names)


def _flag_default(flag: Any) -> str:
    if flag.required:
        return "**required**"
    return "" if flag.default in (None, False) or callable(flag.default) else f"`{flag.default}`"


PARTS: dict[str, Callable[[], str]] = {"options": options, "hooks": hooks, "claims": claims, "commands": commands}


def fresh(page: str) -> str:
    """The page with its generated parts written anew; a KeyError for a part that nothing generates."""
    return _PART.sub(lambda match: f"{match[1]}\n{PARTS[match['name']]()}\n\n{match[3]}", page)


def main() -> None:
    """Rewrite the pages that are not as the code says."""
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = fresh(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(DOCS.parent)}: rewritten", file=sys.stderr)


if __name__ == "__main__":
    main()
