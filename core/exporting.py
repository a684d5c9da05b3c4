"""`burnish export` and plugin commands: found in the registry by name. The built-in target is a plugin too, below."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from .contracts import CommandSpec, ExporterSpec, ExportRequest
from .errors import ConfigError, ModelError, PluginError
from .files import atomic_folder
from .hookspecs import hookimpl
from .machine import describe
from .registry import registry
from .selection import exporters


def export_folder(source: Path, output: Path, target: str, options: Sequence[str]) -> list[Path]:
    """Export a saved folder; returns the files that were written.

    Raises:
        ConfigError: If the target or an option is unknown, or the source is not a saved model.
        PluginError: If two plugins offer the target.
    """
    offers = exporters(registry())
    if target not in offers:
        near = get_close_matches(target, offers, 1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(offers)) or 'none'}"
        raise ConfigError(f"no enabled plugin exports to {target!r}", where="--target", fix=fix)
    if not source.is_dir():
        raise ConfigError("is not a folder", where=str(source), fix="Pass the folder of a saved model or adapter")
    if output.resolve() == source.resolve():
        raise ConfigError("is also the folder to read from", where=f"--to {output}", fix="Write into another folder")
    spec = offers[target][1]
    if missing := spec.needs.missing(describe("cpu")):
        raise ConfigError(missing, where=f"--target {target}", fix="Install what is missing")
    with atomic_folder(output) as staging:
        files = spec.run(ExportRequest(source=source, output=staging, options=_options(options)))
        names = [Path(file).relative_to(staging) for file in files]
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


def plugin_command(name: str) -> Callable[[Sequence[str]], int] | None:
    """The command of that name that a plugin offers, or None.

    Raises:
        PluginError: If two plugins offer it, or the one that does is broken.
    """
    plugins = registry()
    claimants = plugins.claimants("command", name)
    offers = [
        (plugin, spec)
        for plugin, spec in plugins.collect(claimants, "burnish_register_commands", CommandSpec)
        if spec.name == name
    ]
    if len(offers) > 1:
        both = f"{offers[0][0].label} and {offers[1][0].label}"
        raise PluginError(f"{both} both offer the command {name!r}", fix="Disable one of them")
    for plugin in claimants:
        if plugin.id in plugins.failures:
            raise plugins.failures[plugin.id].error()
    return offers[0][1].run if offers else None


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
