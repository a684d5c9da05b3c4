"""Which plugins are installed and what they claim, read from distribution metadata: nothing is imported here.

A distribution names its plugin modules in the entry-point group `burnish` and what each can do in the group
`burnish.capabilities`, as `"kind.value" = "module"` (`contract.N` once, for all of its modules; `"kind.value.anything"`
where two modules claim one thing). Wheels, editable installs and sdists all carry both in
`entry_points.txt`, so the claims of a plugin that cannot even be imported are still known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from .contracts import CONTRACT
from .errors import PluginError
from .settings import ALLOW_VARIABLE, Policy

GROUP, CAPABILITIES = "burnish", "burnish.capabilities"
OWN = "burnish"
KINDS = (
    "contract", "model_type", "fallback", "backend", "operation", "exporter", "command", "observer", "device", "dtype", "attention",
)  # fmt: skip
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
        return name in (self.name, self.id) or _normal(name) == self.distribution


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None:
        return ("unknown", "0")
    return (_normal(point.dist.metadata["Name"]), point.dist.version)


def _refusal(claims: frozenset[tuple[str, str]], odd: list[str]) -> str:
    """Why a plugin with these claims cannot run, or an empty string."""
    if odd:
        return f"capability {odd[0]!r} is not kind.value with a kind of {', '.join(KINDS)}"
    contracts = sorted(value for kind, value in claims if kind == "contract")
    if not contracts:
        return f'declares no contract version: add "contract.{CONTRACT}" to [project.entry-points."{CAPABILITIES}"]'
    if str(CONTRACT) not in contracts:
        return f"is written for contract {', '.join(contracts)}, this Burnish speaks {CONTRACT}: install versions that match"
    return ""


def _claims() -> tuple[dict[tuple[str, str], set[tuple[str, str]]], dict[str, list[str]]]:
    """What each (distribution, module) claims, and each distribution's entries that are no claim at all.

    The contract version holds for a whole distribution and stands under the module name "".
    """
    claims: dict[tuple[str, str], set[tuple[str, str]]] = {}
    odd: dict[str, list[str]] = {}
    for point in entry_points(group=CAPABILITIES):
        kind, value = (*point.name.split(".", 2), "")[:2]
        distribution = _origin(point)[0]
        if kind in KINDS and value:
            module = "" if kind == "contract" else point.module
            claims.setdefault((distribution, module), set()).add((kind, value))
        else:
            odd.setdefault(distribution, []).append(point.name)
    return claims, odd


def installed() -> tuple[Plugin, ...]:
    """Every plugin there is, Burnish's own first, then by distribution and name."""
    claims, odd = _claims()
    plugins = []
    for point in entry_points(group=GROUP):
        distribution, version = _origin(point)
        own = frozenset(claims.get((distribution, point.module), set()) | claims.get((distribution, ""), set()))
        refusal = _refusal(own, odd.get(distribution, []))
        plugins.append(
            Plugin(
                name=point.name, module=point.module, distribution=distribution, version=version,
                claims=own, state="refused" if refusal else "on", reason=refusal,
            )
        )  # fmt: skip
    return tuple(sorted(plugins, key=lambda plugin: (not plugin.own, plugin.distribution, plugin.name)))


def find(plugins: tuple[Plugin, ...], name: str) -> tuple[Plugin, ...]:
    """The plugins a user means by `name`.

    Raises:
        PluginError: If no installed plugin or distribution is called that.
    """
    found = tuple(plugin for plugin in plugins if plugin.called(name))
    if not found:
        known = sorted({plugin.name for plugin in plugins} | {plugin.distribution for plugin in plugins})
        near = get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else "Install it with pip, or take the name out."
        raise PluginError(f"no plugin called {name!r} is installed", fix=f"{hint} Known: {', '.join(known) or 'none'}")
    return found


def under_policy(plugins: tuple[Plugin, ...], policy: Policy) -> tuple[Plugin, ...]:
    """The same plugins with their state under the user's policy.

    Raises:
        PluginError: If the policy names a plugin that is not installed, is refused or is switched off.
    """
    for name in (*sorted(policy.allowed or ()), *policy.named):
        find(plugins, name)
    result = []
    for plugin in plugins:
        in_run = any(plugin.called(name) for name in policy.named)
        in_list = policy.allowed is not None and any(plugin.called(name) for name in policy.allowed)
        reason = _why_off(plugin, policy, in_run, in_list)
        if plugin.state == "refused":
            result.append(plugin)
        elif reason:
            result.append(replace(plugin, state="off", reason=reason))
        else:
            result.append(replace(plugin, named=in_run or (in_list and not plugin.own)))
        _honour(result[-1], in_run)
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
    if in_run and plugin.state != "on":
        fix = f"Enable it: burnish plugins enable {plugin.name}" if "disabled" in plugin.reason else "Take it out of plugins, or mend the cause"
        raise PluginError(f"plugin {plugin.label} is {plugin.state}: {plugin.reason}", where="plugins", fix=fix)
