"""Plugins brought to life: imported when something they claim is needed, asked through pluggy, set aside on failure."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .contracts import BackendSpec, CommandSpec, ExporterSpec, FamilySpec, KernelSpec
from .discovery import CAPABILITIES, Plugin, find, installed, under_policy
from .errors import BurnishError, PluginError
from .settings import Policy, current_policy

Spec = TypeVar("Spec", FamilySpec, BackendSpec, KernelSpec, ExporterSpec, CommandSpec)

# What a stranger's code may raise and stays its own fault. Ctrl-C is the user's.
FAULTS = (Exception, SystemExit)
# An import longer than this is told. A built-in family takes a few milliseconds once its transformers module is there.
SLOW_SECONDS = 2.0
# The claims a hook's answer must agree with.
_KINDS: dict[type, tuple[str, ...]] = {
    FamilySpec: ("model_type", "fallback"),
    BackendSpec: ("backend",),
    KernelSpec: ("operation",),
    ExporterSpec: ("exporter",),
    CommandSpec: ("command",),
}


class PluginWarning(UserWarning):
    """A plugin that was not asked for by name could not be used, or is slow; the message says what that costs."""


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

    def leave_out(self) -> None:
        """Go on without the plugin, with a warning.

        Raises:
            PluginError: If the user named it: then it is needed.
        """
        if self.plugin.named:
            raise self.error()
        message = f"plugin {self.plugin.label} is left out: {self.reason}. {self.tail}".rstrip(". ")
        warnings.warn(message, PluginWarning, stacklevel=4)


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
        return tuple(plugin for plugin in self.plugins if plugin.state == "on" and _claims(plugin, kind, value))

    def absent(self, kind: str, value: str) -> tuple[Plugin, ...]:
        """Plugins that claim it and are off or refused."""
        return tuple(plugin for plugin in self.plugins if plugin.state != "on" and _claims(plugin, kind, value))

    def named(self, name: str) -> tuple[Plugin, ...]:
        """The plugins a user means by `name`; a PluginError that lists the known ones if there are none."""
        return find(self.plugins, name)

    def load(self, plugin: Plugin) -> Failure | None:
        """Import and register a plugin once; returns its failure, or None if it is fit for use."""
        if plugin.id in self.failures or self._manager.has_plugin(plugin.id):
            return self.failures.get(plugin.id)
        if plugin.state == "refused":
            failure = self.failures[plugin.id] = Failure(plugin=plugin, reason=plugin.reason)
            return failure
        started, shared = time.monotonic(), _shared_modules()
        try:
            self._manager.register(import_module(plugin.module), plugin.id)
            self._manager.check_pending()
        except FAULTS as error:
            if self._manager.has_plugin(plugin.id):
                self._manager.unregister(name=plugin.id)
            return self.quarantine(plugin, error)
        took = time.monotonic() - started
        if took > SLOW_SECONDS and shared == _shared_modules():
            cost = f"if you do not need it: burnish plugins disable {plugin.name}"
            warnings.warn(f"plugin {plugin.label} took {took:.1f} s to import; {cost}", PluginWarning, stacklevel=3)
        return None

    def quarantine(self, plugin: Plugin, error: BaseException) -> Failure:
        """Set a plugin aside for what it raised; later look-ups answer with the failure."""
        reason = error.what if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split()).rstrip(": ")
        failure = self.failures[plugin.id] = Failure(plugin=plugin, reason=reason, tail=_place(error))
        return failure

    def ask(self, plugin: Plugin, hook: str, kind: type[Spec]) -> tuple[Spec, ...] | Failure:
        """One plugin's answer to a registering hook, checked; or why it has none."""
        if failure := self.load(plugin):
            return failure
        try:
            specs = [spec for answer in self._call(plugin, hook) for spec in _specs(answer, hook, kind)]
            _compare(plugin, specs, _KINDS[kind])
        except FAULTS as error:
            return self.quarantine(plugin, error)
        return tuple(specs)

    def collect(self, plugins: Iterable[Plugin], hook: str, kind: type[Spec]) -> list[tuple[Plugin, Spec]]:
        """The specs of several plugins. One that the user named must answer; another's failure is a warning."""
        found: list[tuple[Plugin, Spec]] = []
        for plugin in plugins:
            answer = self.ask(plugin, hook, kind)
            if isinstance(answer, Failure):
                answer.leave_out()
            else:
                found.extend((plugin, spec) for spec in answer)
        return found

    def observers(self, event: str) -> Callable[..., None]:
        """A function that tells every plugin which claims `observer.EVENT`, by keywords, in their fixed order.

        An observer that raises is left out from then on, with a warning: a run does not end because somebody watches.
        One that the user named ends it.
        """
        hook = f"burnish_{event}"
        for plugin in self.claimants("observer", event):
            failure = self.load(plugin)
            if failure is None and not self._implements(plugin, hook):
                failure = self.quarantine(plugin, _idle(f"observer.{event}", f"has no {hook}"))
            if failure:
                failure.leave_out()

        def tell(**facts: Any) -> None:
            for plugin in self.claimants("observer", event):
                if plugin.id in self.failures:
                    continue
                try:
                    self._call(plugin, hook, **facts)
                except FAULTS as error:
                    self.quarantine(plugin, error).leave_out()

        return tell

    def _call(self, plugin: Plugin, hook: str, **facts: Any) -> list[Any]:
        others = [other for name, other in self._manager.list_name_plugin() if name != plugin.id and other is not None]
        answers: list[Any] = self._manager.subset_hook_caller(hook, remove_plugins=others)(**facts)
        return answers

    def _implements(self, plugin: Plugin, hook: str) -> bool:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return any(implementation.plugin_name == plugin.id for implementation in caller.get_hookimpls())


def _claims(plugin: Plugin, kind: str, value: str | None) -> bool:
    return any(key == kind and value in (None, claim) for key, claim in plugin.claims)


def _shared_modules() -> int:
    """How many modules of the libraries that every model needs are loaded: whoever is first pays for those."""
    libraries = ("torch", "transformers", "sentence_transformers", "peft")
    return sum(name.split(".", 1)[0] in libraries for name in sys.modules)


def _place(error: BaseException) -> str:
    """Where a plugin's own code raised: the innermost frame that is neither the import system's nor core's."""
    ours = (str(Path(__file__).parent) + os.sep, "<string>", "<frozen ")
    machinery = ("importlib", "pluggy")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        folders = frame.filename.replace("\\", "/").split("/")
        if not frame.filename.startswith(ours) and not any(part in folders for part in machinery):
            return f'File "{frame.filename}", line {frame.lineno}: {frame.line}'
    return ""


def _specs(answer: Any, hook: str, kind: type[Spec]) -> list[Spec]:
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise PluginError(f"{hook} returned {type(answer).__name__}, not a list of {kind.__name__}")
    specs = list(answer)
    if odd := [spec for spec in specs if not isinstance(spec, kind)]:
        raise PluginError(f"{hook} returned a {type(odd[0]).__name__} among its {kind.__name__}s")
    return specs


def _offer(spec: object) -> list[tuple[str, str]]:
    """The claims that make a spec be found."""
    match spec:
        case FamilySpec(fallback=True):
            return [("fallback", "family")]
        case FamilySpec(model_types=model_types):
            return [("model_type", name) for name in model_types]
        case BackendSpec(name=name):
            return [("backend", name)]
        case KernelSpec(operation=name):
            return [("operation", name)]
        case ExporterSpec(target=name):
            return [("exporter", name)]
        case CommandSpec(name=name):
            return [("command", name)]
    raise AssertionError(spec)


def _compare(plugin: Plugin, specs: Iterable[object], kinds: tuple[str, ...]) -> None:
    """Refuse an answer that the metadata does not announce, and metadata that announce what never comes."""
    offered = {offer for spec in specs for offer in _offer(spec)}
    claimed = {(kind, "family" if kind == "fallback" else value) for kind, value in plugin.claims if kind in kinds}
    for kind, value in sorted(offered - claimed):
        fix = f'add "{kind}.{value}" to [project.entry-points."{CAPABILITIES}"] and install it again'
        raise PluginError(f"offers {kind} {value!r} without claiming it in its metadata: {fix}")
    for kind, value in sorted(claimed - offered):
        raise _idle(f"{kind}.{value}", "offers no such thing")


def _idle(claim: str, instead: str) -> PluginError:
    return PluginError(f"claims {claim} in its metadata and {instead} (a hook without @hookimpl is not seen)")


@contextmanager
def blame(plugin: Plugin, doing: str) -> Iterator[None]:
    """Run a plugin's own function: whatever it raises becomes a PluginError with the plugin's name and version."""
    try:
        yield
    except BurnishError:
        raise
    except FAULTS as error:
        what = " ".join(f"{doing} failed: {type(error).__name__}: {error}".split()).rstrip(": ")
        fix = f"Mend or disable {plugin.name}. {_place(error)}".rstrip(". ")
        raise PluginError(what, where=f"plugin {plugin.label}", fix=fix) from error


@cache
def _registry(policy: Policy) -> Registry:
    return Registry(policy)


def registry(plugins: Iterable[str] | None = None) -> Registry:
    """The registry under the user's policy, and for a run that names `plugins`; one per policy and process."""
    return _registry(current_policy(plugins))


def forget() -> None:
    """Drop every registry, so that the next look-up reads the installed distributions again (tests, notebooks)."""
    _registry.cache_clear()
