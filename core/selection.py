"""Which family, backend and kernels a run gets, and why: every choice carries its reasons, for `burnish doctor`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .contracts import BackendSpec, ExporterSpec, Family, FamilySpec, KernelSpec, Machine
from .discovery import Plugin
from .errors import ConfigError, PluginError
from .registry import Failure, PluginWarning, Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """One candidate of a choice: `verdict` is "chosen", "passed over" or "failed"."""

    name: str
    plugin: Plugin
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyChoice:
    """The family for a model, who offers it, and who else might have."""

    family: Family
    plugin: Plugin
    reason: str
    considered: tuple[Considered, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """The backend for a run."""

    spec: BackendSpec
    plugin: Plugin
    reason: str
    considered: tuple[Considered, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The implementation of one operation."""

    spec: KernelSpec
    plugin: Plugin


def choose_family(registry: Registry, config: PretrainedConfig) -> FamilyChoice:
    """The family that takes `config`.

    Among the plugins whose metadata claims `config.model_type`: one the run or the allow-list names, else a built-in,
    else the one stranger that claims it, by the narrowest claim. Nobody: the fallback family.

    Raises:
        PluginError: If two plugins of equal right claim it, or if the only claimant is broken.
    """
    claimants = registry.claimants("model_type", config.model_type)
    considered: list[Considered] = []
    for rank, reason in ((_by_name, "named by you"), (_is_own, "built in"), (_is_stranger, "the only plugin that claims it")):
        tier = [plugin for plugin in claimants if rank(plugin)]
        matches = _matches(registry, tier, config, considered)
        if matches:
            return _narrowest(matches, claimants, config, reason, considered)
    if broken := [item for item in considered if item.verdict == "failed"]:
        raise registry.failures[broken[0].plugin.id].error()
    return _fallback(registry, config, considered)


def _by_name(plugin: Plugin) -> bool:
    return plugin.named


def _is_own(plugin: Plugin) -> bool:
    return plugin.own and not plugin.named


def _is_stranger(plugin: Plugin) -> bool:
    return not plugin.own and not plugin.named


def _matches(
    registry: Registry, plugins: list[Plugin], config: PretrainedConfig, considered: list[Considered]
) -> list[tuple[int, Plugin, FamilySpec]]:
    found = []
    for plugin in plugins:
        answer = registry.ask(plugin, "burnish_register_families", FamilySpec)
        if isinstance(answer, Failure):
            if plugin.named:
                raise answer.error()
            considered.append(Considered(name=plugin.name, plugin=plugin, verdict="failed", reason=answer.reason))
            continue
        for spec in answer:
            if (rank := _rank(registry, plugin, spec, config, considered)) > 0:
                found.append((rank, plugin, spec))
    return found


def _rank(registry: Registry, plugin: Plugin, spec: FamilySpec, config: PretrainedConfig, considered: list[Considered]) -> int:
    try:
        rank = spec.matches(config)
    except Exception as error:  # a stranger's rule; its fault is reported with its name
        failure = registry.quarantine(plugin, error)
        if plugin.named:
            raise failure.error() from error
        considered.append(Considered(name=spec.name, plugin=plugin, verdict="failed", reason=failure.reason))
        return 0
    if rank <= 0:
        reason = f"does not take this {config.model_type} config"
        considered.append(Considered(name=spec.name, plugin=plugin, verdict="passed over", reason=reason))
    return rank


def _narrowest(
    matches: list[tuple[int, Plugin, FamilySpec]],
    claimants: tuple[Plugin, ...],
    config: PretrainedConfig,
    reason: str,
    considered: list[Considered],
) -> FamilyChoice:
    top = max(rank for rank, _, _ in matches)
    best = [(plugin, spec) for rank, plugin, spec in matches if rank == top]
    if len(best) > 1:
        names = " and ".join(f"{spec.name} of {plugin.label}" for plugin, spec in best)
        ids = " or ".join(f"plugins=[{plugin.id!r}]" for plugin, _ in best)
        raise PluginError(f"{names} both claim model type {config.model_type!r}", fix=f"Pick one: {ids}, or disable one")
    plugin, spec = best[0]
    for item in considered:
        if item.verdict == "failed":
            message = f"{item.plugin.label} failed ({item.reason}); {spec.name} of {plugin.label} takes its place"
            warnings.warn(message, PluginWarning, stacklevel=4)
    for other in claimants:
        if other.id != plugin.id and not any(item.plugin.id == other.id for item in considered):
            why = f"also claims {config.model_type}; to use it, name it: plugins=[{other.name!r}]"
            considered.append(Considered(name=other.name, plugin=other, verdict="passed over", reason=why))
    return FamilyChoice(family=_build(spec, plugin, config), plugin=plugin, reason=reason, considered=tuple(considered))


def _build(spec: FamilySpec, plugin: Plugin, config: PretrainedConfig) -> Family:
    try:
        family = spec.build(config)
    except Exception as error:
        raise PluginError(f"building family {spec.name} failed: {type(error).__name__}: {error}", where=f"plugin {plugin.label}") from error
    if not isinstance(family, Family):
        raise PluginError(f"family {spec.name} built a {type(family).__name__}, not a Family", where=f"plugin {plugin.label}")
    return family


def _fallback(registry: Registry, config: PretrainedConfig, considered: list[Considered]) -> FamilyChoice:
    offers = [
        (plugin, spec)
        for plugin, spec in registry.collect(registry.claimants("fallback"), "burnish_register_families", FamilySpec)
        if spec.fallback
    ]
    if not offers:
        known = sorted({value for plugin in registry.plugins for value in plugin.values("model_type")})
        fix = f"Known: {', '.join(known) or 'none'}. {_switched_off(registry)}"
        raise PluginError(f"no enabled plugin takes model type {config.model_type!r}", fix=fix)
    plugin, spec = sorted(offers, key=lambda offer: (not offer[0].named, not offer[0].own))[0]
    reason = f"nobody claims model type {config.model_type}"
    return FamilyChoice(family=_build(spec, plugin, config), plugin=plugin, reason=reason, considered=tuple(considered))


def _switched_off(registry: Registry) -> str:
    off = [f"{plugin.name} ({plugin.reason})" for plugin in registry.plugins if plugin.state != "on"]
    return f"Not on: {', '.join(off)}" if off else "Is Burnish itself installed (pip install burnish)?"


def choose_backend(registry: Registry, machine: Machine, name: str = "auto") -> BackendChoice:
    """The backend called `name`, or with "auto" the best one that this machine can run.

    Raises:
        PluginError: If there is no such backend, two of that name, or none at all.
        ConfigError: If the one asked for cannot run here.
    """
    offers = registry.collect(registry.claimants("backend", None if name == "auto" else name), "burnish_register_backends", BackendSpec)
    if name != "auto":
        offers = [(plugin, spec) for plugin, spec in offers if spec.name == name]
    if not offers:
        known = sorted({value for plugin in registry.claimants("backend") for value in plugin.values("backend")})
        what = "no backend is enabled" if name == "auto" else f"no enabled plugin has a backend {name!r}"
        raise PluginError(what, where="backend", fix=f"Known: {', '.join(known) or 'none'}. {_switched_off(registry)}")
    considered, able = [], []
    for plugin, spec in offers:
        if missing := spec.needs.missing(machine):
            considered.append(Considered(name=spec.name, plugin=plugin, verdict="passed over", reason=missing))
        else:
            able.append((plugin, spec))
    if not able:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in considered)
        raise ConfigError(f"cannot run here: {reasons}", where=f"backend={name!r}", fix='Pass backend="auto" to get the best this machine can run')
    able.sort(key=lambda offer: (offer[1].priority, offer[0].named), reverse=True)
    _refuse_tie(able)
    plugin, spec = able[0]
    for other, lesser in able[1:]:
        considered.append(Considered(name=lesser.name, plugin=other, verdict="passed over", reason=f"{spec.name} comes first"))
    reason = "asked for" if name != "auto" else "the best that this machine can run"
    return BackendChoice(spec=spec, plugin=plugin, reason=reason, considered=tuple(considered))


def _refuse_tie(able: list[tuple[Plugin, BackendSpec]]) -> None:
    if len(able) > 1:
        (first, one), (second, two) = able[:2]
        if one.priority == two.priority and first.named == second.named:
            names = f"{one.name} of {first.label} and {two.name} of {second.label}"
            fix = f"Pass backend={one.name!r} or backend={two.name!r}" if one.name != two.name else f"Disable {first.name} or {second.name}"
            raise PluginError(f"{names} have the same priority {one.priority}", where="backend", fix=fix)


def choose_kernel(registry: Registry, machine: Machine, operation: str) -> KernelChoice | None:
    """The best implementation of an operation that this machine can run, or None if there is none.

    Raises:
        PluginError: If two plugins offer it with equal priority.
    """
    offers = registry.collect(registry.claimants("operation", operation), "burnish_register_kernels", KernelSpec)
    able = [
        KernelChoice(spec=spec, plugin=plugin)
        for plugin, spec in offers
        if spec.operation == operation and spec.needs.missing(machine) is None
    ]
    if not able:
        return None
    able.sort(key=lambda choice: (choice.plugin.named, choice.spec.priority), reverse=True)
    if len(able) > 1 and able[0].spec.priority == able[1].spec.priority and able[0].plugin.named == able[1].plugin.named:
        names = " and ".join(f"{choice.spec.name} of {choice.plugin.label}" for choice in able[:2])
        raise PluginError(f"{names} have the same priority", where=f"operation {operation}", fix="Disable one, or name one in plugins")
    return able[0]


def exporters(registry: Registry) -> dict[str, tuple[Plugin, ExporterSpec]]:
    """Every export target by name.

    Raises:
        PluginError: If two plugins offer one target.
    """
    found: dict[str, tuple[Plugin, ExporterSpec]] = {}
    for plugin, spec in registry.collect(registry.claimants("exporter"), "burnish_register_exporters", ExporterSpec):
        if spec.target in found:
            names = f"{found[spec.target][0].label} and {plugin.label}"
            raise PluginError(f"{names} both offer the export target {spec.target!r}", fix="Disable one of them")
        found[spec.target] = (plugin, spec)
    return found
