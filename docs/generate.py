"""Writes into the pages what the code already says, so that it is said once: `python docs/generate.py`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. The tests compare each with what
this script would write (`tests/unit/test_docs.py`).
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import partial
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
    """Every hook: signature, when it is called, what it takes and returns, its claim."""
    from burnish.core import hookspecs

    found = [hook for name, hook in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("burnish_")]
    return "\n\n".join(_hook(hook) for hook in sorted(found, key=lambda hook: hook.__code__.co_firstlineno))


def _hook(hook: Callable[..., Any]) -> str:
    parts = _docstring(hook)
    about, called = parts["about"].split("\n\n")
    lines = [f"* **Called** {_line(called.removeprefix('Called '))}"]
    lines += [f"* **Takes** `{name}`: {meaning}" for name, meaning in _entries(parts.get("Args", "")).items()]
    lines += [f"* **Returns** {_line(parts['Returns'])}"] if "Returns" in parts else []
    lines += [f"* **Claim** {_line(parts['Claim'])}"]
    return "\n\n".join([f"### {hook.__name__}", _signature(hook), _line(about), "\n".join(lines)])


def _docstring(owner: Any) -> dict[str, str]:
    """A docstring's sections by name; what stands before the first is "about"."""
    text = inspect.cleandoc(owner.__doc__ or "")
    pieces = re.split(r"^(Args|Returns|Raises|Claim|Attributes):[ \n]", text, flags=re.MULTILINE)
    return {"about": pieces[0].strip(), **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def _entries(section: str) -> dict[str, str]:
    """Name to meaning of an Args section."""
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: _line(meaning) for name, meaning in found}


def _line(text: str) -> str:
    return " ".join(text.split())


def _signature(function: Callable[..., Any]) -> str:
    """The signature as a block of code, a parameter a line where one line is too long."""
    signature = inspect.signature(function)
    given = [str(parameter).replace("'", "") for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        given.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = signature.return_annotation
    head, tail = f"def {function.__name__}(", f") -> {result}: ..."
    line = head + ", ".join(given) + tail
    if len(line) > 100:
        line = "\n".join([head, *(f"    {one}," for one in given), tail])
    return f"```py\n{line}\n```"


# The contract's values, in the order in which an author meets them.
_VALUES = {
    "Families": ("FamilySpec", "Family", "Pooling", "LoraTargets", "Packing", "Precision", "Head", "Exports", "Patch"),
    "Backends and kernels": ("BackendSpec", "StepContext", "Inner", "KernelSpec", "Needs", "Machine"),
    "Export targets and commands": ("ExporterSpec", "ExportRequest", "CommandSpec"),
}


def values() -> str:
    """Every value of the contract with each field."""
    from burnish.core import contracts

    kinds = {name: kind for name, kind in vars(contracts).items() if hasattr(kind, "__dataclass_fields__")}
    named = [name for names in _VALUES.values() for name in names]
    if unknown := sorted(set(kinds) ^ set(named)):
        raise SystemExit(f"docs/generate.py: put the values {unknown} into _VALUES")
    return "\n\n".join(
        f"### {group}\n\n" + "\n\n".join(_value(kinds[name], named) for name in names)
        for group, names in _VALUES.items()
    )


def _value(kind: type, known: Sequence[str]) -> str:
    parts = _docstring(kind)
    meanings = _entries(parts.get("Args", ""))
    entries = fields(kind)  # type: ignore[arg-type]
    if odd := sorted({entry.name for entry in entries} ^ meanings.keys()):
        raise SystemExit(f"docs/generate.py: {kind.__name__} and its docstring differ in {odd}")
    rows = [[f"`{entry.name}`", _type(entry.type, known), _shown(entry), meanings[entry.name]] for entry in entries]
    methods = [
        f"`{name}{inspect.signature(method)}`: {_line(method.__doc__)}".replace("'", "")
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and not name.startswith("_") and method.__doc__
    ]
    told = [_line(paragraph) for paragraph in parts["about"].split("\n\n")]
    return "\n\n".join([f"#### {kind.__name__}", *told, table(("Field", "Type", "Default", "Meaning"), rows), *methods])


def _type(written: Any, known: Sequence[str]) -> str:
    """A type in words where it is one of several: a bar ends a table's cell, and shows its escape in code."""
    names = str(written).split(" | ")
    return " or ".join(f"[`{name}`](#{name.lower()})" if name in known else f"`{name}`" for name in names)


def _shown(entry: Any) -> str:
    """A field's default as an author would write it."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "**required**"
    value = entry.default_factory() if entry.default is MISSING else entry.default
    if hasattr(value, "__dataclass_fields__") and value == type(value)():
        return f"`{type(value).__name__}()`"
    return f"`{value.__name__ if inspect.isfunction(value) else repr(value)}`"


def types() -> str:
    """The names that stand for longer types in the fields, and the functions that come with the contract."""
    from burnish.core import contracts, needs, offers

    rows = []
    for module in (contracts, needs, offers):
        body = ast.parse(inspect.getsource(module)).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias" and node.value):
                continue
            alias = ast.literal_eval(node.value) if isinstance(node.value, ast.Constant) else ast.unparse(node.value)
            prose = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            about = _line(str(ast.literal_eval(after.value))) if prose else ""
            rows.append([f"`{ast.unparse(node.target)}`", _type(alias, ()), about])
    helpers = [
        f"{_signature(helper)}\n\n{_line(helper.__doc__)}" for helper in (contracts.patch_all, contracts.no_patches)
    ]
    return "\n\n".join([table(("Name", "Stands for", "What it is"), rows), *helpers])


def operations() -> str:
    """Every operation that kernels implement, as its plain implementation is written."""
    from burnish.core.contracts import KernelSpec
    from burnish.core.registry import Failure, registry

    known, found = registry(()), {}
    for plugin in known.claimants("operation"):
        answer = known.ask(plugin, "burnish_register_kernels", KernelSpec)
        if not isinstance(answer, Failure):
            found |= {spec.operation: spec.load() for spec in answer if plugin.own and spec.priority == 0}
    return "\n\n".join(_operation(name, function) for name, function in sorted(found.items()))


def _operation(name: str, function: Callable[..., Any]) -> str:
    parts, module = _docstring(function), _docstring(inspect.getmodule(function))
    rows = [[f"`{argument}`", meaning] for argument, meaning in _entries(parts["Args"]).items()]
    if missing := inspect.signature(function).parameters.keys() - _entries(parts["Args"]).keys():
        raise SystemExit(f"docs/generate.py: describe {sorted(missing)} of {function.__qualname__}")
    told = [_line(paragraph) for paragraph in (parts["about"].split("\n\n")[0], module["about"].split("\n\n")[-1])]
    returns = f"**Returns** {_line(parts['Returns'])}"
    return "\n\n".join([f"### {name}", _signature(function), *told, table(("Argument", "What it is"), rows), returns])


def checks() -> str:
    """Every check of the conformance suite."""
    from burnish.core.testing.suite import CHECKS

    return table(("Check", "What must hold"), [[name, _line(check.__doc__ or "")] for name, check in CHECKS.items()])


def versions() -> str:
    """The libraries that Burnish rests on: what it allows, and between what it is tested."""
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [_pins(root / name) for name in ("constraints-floor.txt", "constraints.txt")]
    rows = []
    for line in project["dependencies"]:
        if ";" in line:
            continue
        name, allowed = re.fullmatch(r"([\w-]+)(.*)", line).groups()  # type: ignore[union-attr]
        rows.append([name, f"`{allowed}`", *(pin.get(name.replace("_", "-"), "") for pin in pins)])
    return table(("Library", "Allowed", "Tested from", "to"), rows)


def benchmarks(part: str = "goals", script: str = "table.py") -> str:
    """How often each goal is reached by the committed results, or another part of what the script says of them."""
    command = [sys.executable, str(DOCS.parent / "benchmarks" / script), "--part", part]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()


def consumers() -> str:
    """Who reads what Burnish saves, by core/verified_exports.json."""
    return benchmarks("table", "exports.py")


def _pins(path: Path) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def claims() -> str:
    """The kinds of claim that a distribution's metadata may hold."""
    from burnish.core.discovery import KINDS

    if unknown := set(KINDS) ^ set(_CLAIMS):
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


def families() -> str:
    """What each built-in family says of its sample config."""
    from burnish.core.contracts import FamilySpec
    from burnish.core.registry import Failure, registry

    known, rows = registry(()), []
    for plugin in known.claimants("model_type"):
        specs = known.ask(plugin, "burnish_register_families", FamilySpec)
        for spec in () if isinstance(specs, Failure) else specs:
            assert spec.sample is not None
            family = spec.build(spec.sample("tiny"))
            rows.append([f"`{spec.name}`", ", ".join(f"`{kind}`" for kind in spec.model_types), *_settled(family)])
    return table(("Family", "Model types", "Default pooling", "LoRA on", "Packed", "Dtypes", "Heads", "Prompts"), rows)


def _settled(family: Any) -> list[str]:
    normal = ", normalised" if family.pooling.normalize else ""
    order = "causal" if family.packing.causal else "both ways"
    windows = ", windows" if family.packing.sliding_window else ""
    refused = "; ".join(f"never {dtype}" for dtype in family.precision.refused) or "any"
    return [
        f"{family.pooling.mode}{normal}",
        ", ".join(family.lora.names),
        f"{order}{windows}, positions from {family.packing.position_offset}",
        refused,
        ", ".join(f"{task}: {head.reads} token" for task, head in family.heads.items()),
        ", ".join(name for name, text in family.prompts.items() if text) or "none",
    ]


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
    if rows := [*rows, *([_names(flag), _flag_default(flag), flag.help or ""] for flag in flags)]:
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


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        options, hooks, values, types, operations, claims, checks, families, commands, versions, benchmarks, consumers,
    )
} | {part: partial(benchmarks, part) for part in ("memory", "heads", "kept", "context")}  # fmt: skip


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
