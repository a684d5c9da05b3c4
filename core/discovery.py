"""Which plugins are installed and what they claim, read from distribution metadata: nothing is imported here.

A distribution names its plugin modules in the entry-point group `burnish` and what each can do in the group
`burnish.capabilities`, as `"kind.value" = "module"` (`contract.N` once, for all of its modules; `"kind.value.anything"`
where two modules claim one thing). Wheels, editable installs and sdists all carry both in
`entry_points.txt`, so the claims of a plugin that cannot even be imported are still known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Literal

from .contracts import CONTRACT
from .errors import PluginError
from .settings import ALLOW_VARIABLE, Policy

GROUP, CAPABILITIES = "burnish", "burnish.capabilities"
OWN = "burnish"
# What a plugin may offer, each looked up by its claim. The other kinds only tell the user more.
OFFERS = ("model_type", "fallback", "backend", "operation", "exporter", "command", "observer")
KINDS = ("contract", *OFFERS, "device", "dtype", "attention")
EVENTS = ("model_loaded", "step_finished", "model_saved")
_TABLE = f'[project.entry-points."{CAPABILITIES}"]'
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
State = Literal["on", "off", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One plugin module of one distribution.

    Args:
        name: Its entry-point name.
        module: The module to import.
        distribution: Name of the distribution that installs it, and `version` its version.
        claims: (kind, value) pairs from the metadata.
        state: "on", "off" (the user's choice) or "refused" (cannot run with this Burnish); `reason` says why.
        named: Whether the user named it, by the run or by the allow-list; a named plugin may replace a built-in.
    """

    name: str
    module: str
    distribution: str
    version: str
    claims: frozenset[tuple[str, str]]
    state: State = "on"
    reason: str = ""
    named: bool = False

    @property
    def id(self) -> str:
        """`distribution:name`, unique even where two distributions use one name."""
        return f"{self.distribution}:{self.name}"

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def own(self) -> bool:
        """Whether it comes with Burnish itself."""
        return self.distribution == OWN

    def values(self, kind: str) -> tuple[str, ...]:
        """What it claims of one kind, sorted."""
        return tuple(sorted(value for key, value in self.claims if key == kind))

    def called(self, name: str) -> bool:
        """Whether a user who says `name` means this plugin: its name, its distribution, or both with a colon."""
        distribution, colon, own_name = name.partition(":")
        if colon:
            return own_name == self.name and _normal(distribution) == self.distribution
        return name == self.name or _normal(name) == self.distribution


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(slots=True, kw_only=True)
class _Installed:
    """One distribution's entries of the two groups; `fault` says why it has none that can be used."""

    name: str
    version: str
    modules: dict[str, str] = field(default_factory=dict)
    claims: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    contracts: set[tuple[str, str]] = field(default_factory=set)
    fault: str = ""

    def add_claim(self, point: EntryPoint) -> None:
        kind, value = (*point.name.split(".", 2), "")[:2]
        if kind not in KINDS or not value:
            self.fault = self.fault or f"capability {point.name!r} is not kind.value with a kind of {', '.join(KINDS)}"
        elif kind == "observer" and value not in EVENTS:
            self.fault = self.fault or f"capability {point.name!r}: there is no event but {', '.join(EVENTS)}"
        elif kind == "contract":
            self.contracts.add((kind, value))
        else:
            self.claims.setdefault(point.value.strip(), set()).add((kind, value))

    def refusal(self) -> str:
        """Why no plugin of this distribution can run, or an empty string."""
        versions = sorted(value for _, value in self.contracts)
        if self.fault:
            return self.fault
        if not versions:
            return f'declares no contract version: add "contract.{CONTRACT}" to {_TABLE}'
        if str(CONTRACT) not in versions:
            spoken = ", ".join(versions)
            return f"is written for contract {spoken}, this Burnish speaks {CONTRACT}: install versions that match"
        for module in sorted(self.claims.keys() - self.modules.values()):
            claim = ".".join(min(self.claims[module]))
            return f"capability {claim!r} names {module}, which is no plugin: name it under entry points {GROUP!r} too"
        return ""

    def plugins(self) -> Iterator[Plugin]:
        refusal = self.refusal()
        # Claims without a plugin, or entry points that cannot be read, are told under the distribution's own name.
        for name, module in sorted((self.modules or {self.name: ""}).items()):
            claims = frozenset(self.claims.get(module, set()) | self.contracts)
            reason = refusal or _module_refusal(self, name, module, claims)
            yield Plugin(
                name=name, module=module, distribution=self.name, version=self.version,
                claims=claims, state="refused" if reason else "on", reason=reason,
            )  # fmt: skip


def _module_refusal(owner: _Installed, name: str, module: str, claims: frozenset[tuple[str, str]]) -> str:
    if not _MODULE.fullmatch(module):
        return f"entry point {name} = {module!r} does not name a module"
    if name == OWN != owner.name:
        return f"the name {OWN!r} is Burnish's own: call the entry point something else"
    if not any(kind in OFFERS for kind, _ in claims):
        return f"claims nothing, so that nothing would ever ask it: add what it offers to {_TABLE}"
    return ""


def _read(distribution: Distribution) -> _Installed | None:
    """A distribution's entries, or None if it has none of ours.

    Read apart from each other: `importlib.metadata.entry_points` raises for all if one file cannot be parsed.
    """
    text = distribution.read_text("entry_points.txt") or ""
    if f"[{GROUP}" not in text:  # before the metadata is parsed: that costs more than all the rest together
        return None
    metadata = distribution.metadata
    # A missing key is None here, an error in Pythons to come, and typeshed has no `get`.
    name = metadata["Name"] if "Name" in metadata else "unknown"  # noqa: SIM401
    version = metadata["Version"] if "Version" in metadata else "0"  # noqa: SIM401
    found = _Installed(name=_normal(name), version=version)
    try:
        points = [point for point in distribution.entry_points if point.group in (GROUP, CAPABILITIES)]
    except Exception as error:  # a malformed file; whatever the parser stumbles over is the distribution's fault
        found.fault = f"its entry_points.txt cannot be read ({type(error).__name__}: {error})"
        return found
    for point in points:
        if point.group == GROUP:
            found.modules.setdefault(point.name, point.value.strip())
        else:
            found.add_claim(point)
    return found if points else None


def installed() -> tuple[Plugin, ...]:
    """Every plugin there is, Burnish's own first, then by distribution and name."""
    found: dict[str, _Installed] = {}
    for distribution in distributions():
        entry = _read(distribution)
        # The first of two copies on the path is the one that imports find.
        if entry is not None:
            found.setdefault(entry.name, entry)
    plugins = [plugin for entry in found.values() for plugin in entry.plugins()]
    plugins.sort(key=lambda plugin: (not plugin.own, plugin.distribution, plugin.name))
    return tuple(_refuse_shared_modules(plugins))


def _refuse_shared_modules(plugins: list[Plugin]) -> Iterator[Plugin]:
    """Only one of two plugins that name one module can be what gets imported."""
    owners: dict[str, Plugin] = {}
    for plugin in plugins:
        owner = owners.setdefault(plugin.module, plugin)
        if owner is plugin or plugin.state == "refused":
            yield plugin
        else:
            yield replace(plugin, state="refused", reason=f"names the module {plugin.module}, as {owner.label} does")


def find(plugins: tuple[Plugin, ...], name: str, where: str | None = None) -> tuple[Plugin, ...]:
    """The plugins a user means by `name`, said at `where`.

    Raises:
        PluginError: If no installed plugin or distribution is called that.
    """
    found = tuple(plugin for plugin in plugins if plugin.called(name))
    if not found:
        known = sorted({plugin.name for plugin in plugins} | {plugin.distribution for plugin in plugins})
        near = get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else "Install it with pip, or take the name out."
        fix = f"{hint} Known: {', '.join(known) or 'none'}"
        raise PluginError(f"no plugin called {name!r} is installed", where=where, fix=fix)
    return found


def under_policy(plugins: tuple[Plugin, ...], policy: Policy) -> tuple[Plugin, ...]:
    """The same plugins with their state under the user's policy. What the user switched off is off, fit or not.

    Raises:
        PluginError: If the policy names a plugin that is not installed, or the run names one that is off or refused.
    """
    for name in sorted(policy.allowed or ()):
        find(plugins, name, ALLOW_VARIABLE)
    for name in policy.named:
        find(plugins, name, "plugins")
    result = []
    for plugin in plugins:
        in_run = any(plugin.called(name) for name in policy.named)
        in_list = policy.allowed is not None and any(plugin.called(name) for name in policy.allowed)
        if reason := _why_off(plugin, policy, in_run, in_list):
            plugin = replace(plugin, state="off", reason=reason)
        plugin = replace(plugin, named=in_run or (in_list and not plugin.own))
        _honour(plugin, in_run)
        result.append(plugin)
    return tuple(result)


def _why_off(plugin: Plugin, policy: Policy, in_run: bool, in_list: bool) -> str:
    if policy.allowed is not None and not in_list:
        return f"not in {ALLOW_VARIABLE}"
    if any(plugin.called(name) for name in policy.disabled):
        return "disabled by `burnish plugins disable`"
    if policy.only_own and not plugin.own and not in_run:
        return "this run uses no plugins of others"
    return ""


def _honour(plugin: Plugin, in_run: bool) -> None:
    if not in_run or plugin.state == "on":
        return
    fix = "Take it out of plugins, or mend the cause"
    if plugin.reason.startswith("disabled"):
        fix = f"Enable it: burnish plugins enable {plugin.name}"
    elif plugin.reason.endswith(ALLOW_VARIABLE):
        fix = f"Add {plugin.id} to {ALLOW_VARIABLE}, or unset it"
    raise PluginError(f"plugin {plugin.label} is {plugin.state}: {plugin.reason}", where="plugins", fix=fix)
