"""`burnish export` and plugin commands: found in the registry by name. The built-in target is a plugin too, below."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from .card_exports import complete_export
from .contracts import CommandSpec, ExporterSpec, ExportRequest
from .discovery import Plugin
from .errors import BurnishError, ConfigError, ModelError, PluginError
from .files import atomic_folder
from .hookspecs import hookimpl
from .machine import describe
from .registry import Failure, registry
from .selection import exporters

Result = TypeVar("Result")


def export_folder(source: Path, output: Path, target: str, options: Sequence[str]) -> list[Path]:
    """Export a saved folder; returns the files that were written.

    Raises:
        ConfigError: If the target or an option is unknown, or the source is not a saved model.
        PluginError: If two plugins offer the target, or the one that does fails.
    """
    target, colon, argument = target.partition(":")
    offers = exporters(registry(), target)
    if target not in offers:
        near = get_close_matches(target, offers, 1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(offers)) or 'none'}"
        raise ConfigError(f"no enabled plugin exports to {target!r}", where="--target", fix=fix)
    if not source.is_dir():
        raise ConfigError("is not a folder", where=str(source), fix="Pass the folder of a saved model or adapter")
    if output.resolve() == source.resolve():
        raise ConfigError("is also the folder to read from", where=f"--to {output}", fix="Write into another folder")
    plugin, spec = offers[target]
    if colon and not (spec.argument and argument):
        fix = f"Write {target}" + (f":{spec.argument.upper()}" if spec.argument else "")
        raise ConfigError(f"{argument!r} means nothing to {target}", where="--target", fix=fix)
    if missing := spec.needs.missing(describe("cpu")):
        extra = target if target in ("openvino", "gguf") else "onnx"
        fix = f"pip install 'burnish[{extra}]'" if plugin.own and spec.needs.packages else "Install what is missing"
        raise ConfigError(missing, where=f"--target {target}", fix=fix)
    with atomic_folder(output) as staging:
        given = _options(options) | ({spec.argument: argument} if colon else {})
        request = ExportRequest(source=source, output=staging, options=given)
        names = _guarded(plugin, lambda: [Path(file).relative_to(staging) for file in spec.run(request)])
        complete_export(source, staging)
    return [output / name for name in names]


def _options(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            fix = "Write for instance --option dtype=16bit"
            raise ConfigError(f"{item!r} is not KEY=VALUE", where="--option", fix=fix)
        pairs[key] = value
    return pairs


def _guarded(plugin: Plugin, run: Callable[[], Result]) -> Result:
    """What a plugin's function returns. What it raises is the plugin's fault, but for the user's and the disk's."""
    try:
        return run()
    except (BurnishError, OSError):
        raise
    except Exception as error:
        raise registry().quarantine(plugin, error).error() from error


def plugin_commands() -> list[tuple[str, str]]:
    """(command, distribution) of every command that plugins which are on claim; nothing is imported."""
    plugins = registry().claimants("command")
    return [(name, plugin.distribution) for plugin in plugins for name in plugin.values("command")]


def plugin_command(name: str) -> Callable[[Sequence[str]], int] | None:
    """The command of that name that a plugin offers, or None where none claims it.

    Raises:
        PluginError: If two plugins offer it, or the one that does is off, broken, or fails when it runs.
    """
    plugins = registry()
    claimants = plugins.claimants("command", name)
    if not claimants:
        if absent := plugins.absent("command", name):
            reason = f"it is {absent[0].state} ({absent[0].reason})"
            fix = f"See `burnish plugins`, or run `burnish plugins enable {absent[0].name}`"
            raise PluginError(f"{absent[0].label} offers the command {name!r}, but {reason}", fix=fix)
        return None
    if len(claimants) > 1:
        both = f"{claimants[0].label} and {claimants[1].label}"
        raise PluginError(f"{both} both offer the command {name!r}", fix="Disable one of them")
    plugin, answer = claimants[0], plugins.ask(claimants[0], "burnish_register_commands", CommandSpec)
    if isinstance(answer, Failure):
        raise answer.error()
    spec = next(spec for spec in answer if spec.name == name)  # the registry sees to it that what is claimed is there
    return lambda arguments: _guarded(plugin, lambda: spec.run(arguments))


def merged(request: ExportRequest) -> Sequence[Path]:
    """Fold a saved adapter into its base model. Option `dtype`: 16bit or 32bit; left out, the base model's own."""
    from .fast import FastSentenceTransformer

    methods = {"16bit": "merged_16bit", "32bit": "merged_32bit"}
    unknown = sorted(set(request.options) - {"dtype"})
    if unknown or request.options.get("dtype", "16bit") not in methods:
        given = ", ".join(f"{key}={value}" for key, value in request.options.items())
        fix = "The target merged takes dtype=16bit or dtype=32bit"
        raise ConfigError(f"{given} is not understood", where="--option", fix=fix)
    if not (request.source / "adapter_config.json").exists():
        fix = "Pass an adapter folder; a full model needs no merging"
        raise ModelError("holds no adapter to merge", where=str(request.source), fix=fix)
    model = FastSentenceTransformer.from_pretrained(str(request.source), for_inference=True, device="cpu")
    made = request.output / "model"
    model.save_pretrained_merged(made, save_method=methods.get(request.options.get("dtype", "")))
    for entry in sorted(made.iterdir()):
        shutil.move(str(entry), request.output / entry.name)
    made.rmdir()
    return sorted(path for path in request.output.rglob("*") if path.is_file())


@hookimpl
def burnish_register_exporters() -> Iterable[ExporterSpec]:
    return [ExporterSpec(target="merged", summary="one full model: the adapter folded into its base", run=merged)]
