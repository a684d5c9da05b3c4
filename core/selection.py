"""Which family, backend and kernels a run gets, and why: every choice carries its reasons, for `burnish doctor`.

Right comes first, in one order for everything: what the user named, then what is built in, then what strangers bring. A
stranger's part that is not named never takes the place of a built-in one; the references are only what is left when
nothing better can be had, and give way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn, TypeVar

from .choices import BackendChoice, Considered, FamilyChoice, KernelChoice
from .contracts import BackendSpec, ExporterSpec, Family, FamilySpec, KernelSpec, Machine
from .discovery import Plugin
from .errors import ConfigError, PluginError
from .registry import FAULTS, Failure, PluginWarning, Registry, blame
from .settings import ALLOW_VARIABLE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Ranked = TypeVar("Ranked", BackendSpec, KernelSpec)


def _by_right(plugins: Iterable[Plugin]) -> Iterator[tuple[str, list[Plugin]]]:
    """The plugins in three groups, those with the better right first, and what to call each group."""
    plugins = list(plugins)
    yield "named by you", [plugin for plugin in plugins if plugin.named]
    yield "built in", [plugin for plugin in plugins if plugin.own and not plugin.named]
    yield "the only plugin that claims it", [plugin for plugin in plugins if not plugin.own and not plugin.named]


def choose_family(registry: Registry, config: PretrainedConfig) -> FamilyChoice:
    """The family that takes `config`.

    Among the plugins whose metadata claims `config.model_type`: one the run or the allow-list names, else a built-in,
    else the one stranger that claims it, by the narrowest claim. Nobody: the fallback family.

    Raises:
        PluginError: If two plugins of equal right claim it, or if all that claim it are broken or refused.
    """
    claimants = registry.claimants("model_type", config.model_type)
    absent = registry.absent("model_type", config.model_type)
    considered = [_passed(plugin, plugin.name, f"{plugin.state}: {plugin.reason}") for plugin in absent]
    for reason, tier in _by_right(claimants):
        matches = _matches(registry, tier, config, considered)
        if matches:
            return _narrowest(matches, claimants, config, reason, considered)
    for item in considered:
        if item.verdict == "failed" or item.plugin.state == "refused":
            _raise_failure(registry, item.plugin)
    return _fallback(registry, config, considered)


def _passed(plugin: Plugin, name: str, reason: str) -> Considered:
    return Considered(name=name, plugin=plugin, verdict="passed over", reason=reason)


def _raise_failure(registry: Registry, plugin: Plugin) -> NoReturn:
    failure = registry.load(plugin)
    assert failure is not None
    raise failure.error()


def _matches(
    registry: Registry, plugins: list[Plugin], config: PretrainedConfig, considered: list[Considered]
) -> list[tuple[int, Plugin, FamilySpec]]:
    found = []
    for plugin in plugins:
        answer = registry.ask(plugin, "burnish_register_families", FamilySpec)
        if not isinstance(answer, Failure):
            try:
                found += [(rank, plugin, spec) for spec in answer if (rank := spec.matches(config)) > 0]
            except FAULTS as error:  # a stranger's rule
                answer = registry.quarantine(plugin, error)
                found = [match for match in found if match[1] is not plugin]
        if isinstance(answer, Failure):
            if plugin.named:
                raise answer.error()
            considered.append(Considered(name=plugin.name, plugin=plugin, verdict="failed", reason=answer.reason))
        elif not any(match[1] is plugin for match in found):
            considered.append(_passed(plugin, plugin.name, f"does not take this {config.model_type} config"))
    return found


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
        _refuse_meeting(best, f"model type {config.model_type!r}")
    plugin, spec = best[0]
    for item in considered:
        if item.verdict == "failed":
            message = f"{item.plugin.label} failed ({item.reason}); {spec.name} of {plugin.label} takes its place"
            warnings.warn(message, PluginWarning, stacklevel=4)
    for other in claimants:
        if other.id != plugin.id and not any(item.plugin.id == other.id for item in considered):
            why = f"also claims {config.model_type}; to use it, name it: plugins=[{other.name!r}]"
            considered.append(_passed(other, other.name, why))
    return FamilyChoice(family=_build(spec, plugin, config), plugin=plugin, reason=reason, considered=tuple(considered))


def _refuse_meeting(best: list[tuple[Plugin, FamilySpec]], what: str) -> NoReturn:
    names = " and ".join(f"{spec.name} of {plugin.label}" for plugin, spec in best)
    ids = sorted({plugin.id for plugin, _ in best})
    if len(ids) == 1:
        raise PluginError(f"{names} both claim {what}", fix="The plugin must give one of them a higher specificity")
    pick = " or ".join(f"plugins=[{name!r}]" for name in ids)
    raise PluginError(f"{names} both claim {what}", fix=f"Pick one: {pick}, or disable one")


def _build(spec: FamilySpec, plugin: Plugin, config: PretrainedConfig) -> Family:
    with blame(plugin, f"building family {spec.name}"):
        family = spec.build(config)
    if not isinstance(family, Family):
        what = f"family {spec.name} built a {type(family).__name__}, not a Family"
        raise PluginError(what, where=f"plugin {plugin.label}", fix=f"Mend or disable {plugin.name}")
    return family


def _fallback(registry: Registry, config: PretrainedConfig, considered: list[Considered]) -> FamilyChoice:
    for _, tier in _by_right(registry.claimants("fallback")):
        offers = registry.collect(tier, "burnish_register_families", FamilySpec)
        offers = [(plugin, spec) for plugin, spec in offers if spec.fallback]
        if len(offers) > 1:
            _refuse_meeting(offers, "every model that nobody else claims")
        if offers:
            plugin, spec = offers[0]
            absent = [item for item in considered if item.plugin.state != "on"]
            off = "".join(f"; {item.plugin.label} does and is {item.reason}" for item in absent)
            reason = (
                f"{'no enabled plugin takes' if considered else 'nobody claims'} model type {config.model_type}{off}"
            )
            family = _build(spec, plugin, config)
            return FamilyChoice(family=family, plugin=plugin, reason=reason, considered=tuple(considered))
    known = sorted({value for plugin in registry.plugins for value in plugin.values("model_type")})
    fix = f"{_remedy(registry, 'model_type', config.model_type)}. Known: {', '.join(known) or 'none'}"
    raise PluginError(f"no enabled plugin takes model type {config.model_type!r}", fix=fix)


def _remedy(registry: Registry, kind: str, value: str | None = None) -> str:
    """What to do where nothing that is on offers a thing: switch on what does, or install it."""
    fallback = {"model_type": "fallback"}.get(kind, "")
    for plugin in registry.plugins:
        claims = plugin.values(kind)
        if plugin.state == "on" or not (claims if value is None else value in claims or plugin.values(fallback)):
            continue
        return switch_on(plugin)
    return "Install a plugin that does, or Burnish itself again if its own are missing (`burnish plugins`)"


def switch_on(plugin: Plugin) -> str:
    """What the user does to get a plugin that is off; of a refused one, why it is."""
    if plugin.reason.endswith(ALLOW_VARIABLE):
        return f"Add {plugin.distribution} to {ALLOW_VARIABLE}, or unset it"
    if plugin.reason.startswith("disabled"):
        return f"Run `burnish plugins enable {plugin.name}`"
    if plugin.state == "off":
        return f"Name it: plugins=[{plugin.id!r}]"
    return f"{plugin.label} is refused: {plugin.reason}"


def choose_backend(registry: Registry, machine: Machine, name: str = "auto") -> BackendChoice:
    """The backend called `name`, or with "auto" the best one that this machine can run.

    Raises:
        PluginError: If there is no such backend, two of that name and rank, or none at all.
        ConfigError: If the one asked for cannot run here.
    """
    wanted = None if name == "auto" else name
    claimants = registry.claimants("backend", wanted)
    offers = registry.collect(claimants, "burnish_register_backends", BackendSpec)
    if wanted:
        offers = [(plugin, spec) for plugin, spec in offers if spec.name == wanted]
    if not offers:
        _refuse_backend(registry, wanted, claimants)
    able, considered = _able(offers, machine, {spec.name for plugin, spec in offers if plugin.own}, bool(wanted))
    if not able:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in considered)
        fix = 'Pass backend="auto" to get the best this machine can run' if wanted else "Enable the reference backend"
        raise ConfigError(f"cannot run here: {reasons}", where=f"backend={name!r}", fix=fix)
    if _tie(able):
        (first, one), (second, two) = able[:2]
        fix = f"Pass backend={one.name!r} or backend={two.name!r}"
        if one.name == two.name:
            fix = f"Pick one: plugins=[{first.id!r}] or plugins=[{second.id!r}], or disable one"
        what = f"{one.name} of {first.label} and {two.name} of {second.label} have the same priority {one.priority}"
        raise PluginError(what, where="backend", fix=fix)
    plugin, spec = able[0]
    considered += [_passed(other, lesser.name, f"{spec.name} comes first") for other, lesser in able[1:]]
    reason = "asked for" if wanted else "the best that this machine can run"
    return BackendChoice(spec=spec, plugin=plugin, reason=reason, considered=tuple(considered))


def _refuse_backend(registry: Registry, wanted: str | None, claimants: tuple[Plugin, ...]) -> NoReturn:
    """Say why there is no backend to choose: the one that has it failed or is off, or nobody has it."""
    refused = [plugin for plugin in registry.absent("backend", wanted) if plugin.state == "refused"] if wanted else []
    for plugin in (*claimants, *refused):
        if plugin.id in registry.failures or plugin.state == "refused":
            _raise_failure(registry, plugin)
    known = sorted({value for plugin in registry.claimants("backend") for value in plugin.values("backend")})
    what = f"no enabled plugin has a backend {wanted!r}" if wanted else "no backend is enabled"
    fix = f"{_remedy(registry, 'backend', wanted)}. Known: {', '.join(known) or 'none'}"
    raise PluginError(what, where="backend", fix=fix)


def _able(
    offers: list[tuple[Plugin, Ranked]], machine: Machine, taken: set[str], asked: bool
) -> tuple[list[tuple[Plugin, Ranked]], list[Considered]]:
    """The offers that can be had, best first, and the others with the reason.

    Args:
        offers: What plugins offer.
        machine: Where it would run.
        taken: Names of built-in parts, which an unnamed stranger's may not go by.
        asked: Whether the user asked for the part by its name.
    """
    able, considered = [], []
    for plugin, spec in offers:
        if missing := spec.needs.missing(machine):
            considered.append(_passed(plugin, spec.name, missing))
        else:
            able.append((plugin, spec))
    # A reference has priority 0 and gives way to anybody.
    built_in = not asked and any(plugin.own and spec.priority > 0 for plugin, spec in able)
    for plugin, spec in list(able):
        if not plugin.own and not plugin.named and (built_in or spec.name in taken):
            able.remove((plugin, spec))
            why = f"a built-in one can be had; to use this one, name it: plugins=[{plugin.name!r}]"
            considered.append(_passed(plugin, spec.name, why))
    return sorted(able, key=_rank, reverse=True), considered


def _rank(offer: tuple[Plugin, Ranked]) -> tuple[int, bool, bool]:
    plugin, spec = offer
    return (spec.priority, plugin.named, plugin.own)


def _tie(able: list[tuple[Plugin, Ranked]]) -> bool:
    return len(able) > 1 and _rank(able[0]) == _rank(able[1])


def choose_kernel(registry: Registry, machine: Machine, operation: str) -> KernelChoice | None:
    """The best implementation of an operation that this machine can run, or None if there is none.

    A plugin that the user names comes before any other: there is no way to ask for an implementation by its own name.

    Raises:
        PluginError: If two plugins of equal right offer it with equal priority, or a named one is broken.
    """
    offers = registry.collect(registry.claimants("operation", operation), "burnish_register_kernels", KernelSpec)
    offers = [(plugin, spec) for plugin, spec in offers if spec.operation == operation]
    able, _ = _able(offers, machine, {spec.name for plugin, spec in offers if plugin.own}, False)
    able = [offer for offer in able if offer[0].named] or able
    if _tie(able):
        names = " and ".join(f"{spec.name} of {plugin.label}" for plugin, spec in able[:2])
        fix = f"Disable one, or name one: plugins=[{able[0][0].id!r}]"
        raise PluginError(f"{names} have the same priority", where=f"operation {operation}", fix=fix)
    return KernelChoice(spec=able[0][1], plugin=able[0][0]) if able else None


def exporters(registry: Registry, target: str | None = None) -> dict[str, tuple[Plugin, ExporterSpec]]:
    """Every export target by name.

    Args:
        registry: The plugins.
        target: The target that is asked for: two plugins may then clash over another one.

    Raises:
        PluginError: If two plugins of equal right offer one target.
    """
    found: dict[str, tuple[Plugin, ExporterSpec]] = {}
    for _, tier in _by_right(registry.claimants("exporter")):
        mine: dict[str, tuple[Plugin, ExporterSpec]] = {}
        for plugin, spec in registry.collect(tier, "burnish_register_exporters", ExporterSpec):
            if spec.target in mine and spec.target not in found and target in (None, spec.target):
                names = f"{mine[spec.target][0].label} and {plugin.label}"
                fix = f"Disable one, or name one: plugins=[{plugin.id!r}]"
                raise PluginError(f"{names} both offer the export target {spec.target!r}", fix=fix)
            mine.setdefault(spec.target, (plugin, spec))
        found = mine | found
    return found
