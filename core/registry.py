"""Plugins brought to life: imported when something they claim is needed, asked through pluggy, set aside when they fail."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .contracts import BackendSpec, CommandSpec, ExporterSpec, FamilySpec, KernelSpec
from .discovery import Plugin, find, installed, under_policy
from .errors import PluginError
from .settings import Policy, current_policy

Spec = TypeVar("Spec", FamilySpec, BackendSpec, KernelSpec, ExporterSpec, CommandSpec)


class PluginWarning(UserWarning):
    """A plugin that was not asked for by name could not be used; the message says what that costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a plugin is in quarantine: one line, and the end of the traceback where there is one."""

    plugin: Plugin
    reason: str
    tail: str = ""

    def error(self) -> PluginError:
        """The failure as an error for a run that needs the plugin."""
        where = f"plugin {self.plugin.label}"
        fix = f"Mend or uninstall {self.plugin.distribution}, or run `burnish plugins disable {self.plugin.name}`"
        return PluginError(self.reason, where=where, fix=f"{fix}. {self.tail}".rstrip(". "))


class Registry:
    """The plugins of one policy.

    Nothing is imported until a look-up needs it. A plugin that raises, answers garbage or misspells a hook goes into
    `failures`; the others go on.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.plugins = under_policy(installed(), policy)
        self.failures: dict[str, Failure] = {}
        self._manager = pluggy.PluginManager("burnish")
        self._manager.add_hookspecs(hookspecs)

    def claimants(self, kind: str, value: str | None = None) -> tuple[Plugin, ...]:
        """Plugins that are on and claim `kind` (and `value`), in their fixed order; none is imported."""
        return tuple(
            plugin for plugin in self.plugins
            if plugin.state == "on" and any(key == kind and value in (None, claim) for key, claim in plugin.claims)
        )  # fmt: skip

    def named(self, name: str) -> tuple[Plugin, ...]:
        """The plugins a user means by `name`; a PluginError that lists the known ones if there are none."""
        return find(self.plugins, name)

    def load(self, plugin: Plugin) -> Failure | None:
        """Import and register a plugin once; returns its failure, or None if it is fit for use."""
        if plugin.id in self.failures or self._manager.has_plugin(plugin.id):
            return self.failures.get(plugin.id)
        try:
            self._manager.register(import_module(plugin.module), plugin.id)
            self._manager.check_pending()
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises stays its own fault
            if self._manager.has_plugin(plugin.id):
                self._manager.unregister(name=plugin.id)
            return self.quarantine(plugin, error)
        return None

    def quarantine(self, plugin: Plugin, error: BaseException) -> Failure:
        """Set a plugin aside for what it raised; later look-ups answer with the failure."""
        frames = traceback.extract_tb(error.__traceback__)
        tail = f'File "{frames[-1].filename}", line {frames[-1].lineno}: {frames[-1].line}' if frames else ""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        failure = self.failures[plugin.id] = Failure(plugin=plugin, reason=reason, tail=tail)
        return failure

    def ask(self, plugin: Plugin, hook: str, kind: type[Spec]) -> tuple[Spec, ...] | Failure:
        """One plugin's answer to a registering hook, checked; or why it has none."""
        if failure := self.load(plugin):
            return failure
        others = [other for name, other in self._manager.list_name_plugin() if name != plugin.id and other is not None]
        try:
            answers = self._manager.subset_hook_caller(hook, remove_plugins=others)()
            specs = [spec for answer in answers for spec in _specs(answer, hook, kind)]
        except Exception as error:
            return self.quarantine(plugin, error)
        return tuple(specs)

    def collect(self, plugins: Iterable[Plugin], hook: str, kind: type[Spec]) -> list[tuple[Plugin, Spec]]:
        """The specs of several plugins. One that the user named must answer; another's failure is a warning."""
        found: list[tuple[Plugin, Spec]] = []
        for plugin in plugins:
            answer = self.ask(plugin, hook, kind)
            if isinstance(answer, Failure):
                if plugin.named:
                    raise answer.error()
                warnings.warn(f"plugin {plugin.label} is left out: {answer.reason}. {answer.tail}", PluginWarning, stacklevel=3)
                continue
            found.extend((plugin, spec) for spec in answer)
        return found

    def observers(self, event: str) -> Callable[..., Any]:
        """The hook `burnish_EVENT`, with every plugin that claims `observer.EVENT` registered."""
        for plugin in self.claimants("observer", event):
            failure = self.load(plugin)
            if failure and plugin.named:
                raise failure.error()
            if failure:
                warnings.warn(f"observer {plugin.label} is left out: {failure.reason}. {failure.tail}", PluginWarning, stacklevel=2)
        caller: Callable[..., Any] = getattr(self._manager.hook, f"burnish_{event}")
        return caller


def _specs(answer: Any, hook: str, kind: type[Spec]) -> list[Spec]:
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise TypeError(f"{hook} returned {type(answer).__name__}, not a list of {kind.__name__}")
    specs = list(answer)
    if odd := [spec for spec in specs if not isinstance(spec, kind)]:
        raise TypeError(f"{hook} returned a {type(odd[0]).__name__} among its {kind.__name__}s")
    return specs


@cache
def _registry(policy: Policy) -> Registry:
    return Registry(policy)


def registry(plugins: Iterable[str] | None = None) -> Registry:
    """The registry under the user's policy, and for a run that names `plugins`; one per policy and process."""
    return _registry(current_policy(plugins))


def forget() -> None:
    """Drop every registry, so that the next look-up reads the installed distributions again (tests, notebooks)."""
    _registry.cache_clear()
