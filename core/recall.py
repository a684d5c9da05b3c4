"""What a model was trained with, read back when it is loaded; and what of it is missed: plugins that are not here now.

Nothing here keeps a model from being loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .discovery import OWN
from .provenance import FILE, Provenance, Record, parse
from .registry import PluginWarning, registry
from .selection import switch_on

if TYPE_CHECKING:
    from .loading import Decision
    from .registry import Registry

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+!]*")


def recall(name: str, decision: Decision, **hub: Any) -> Provenance | None:
    """The record of the model at `name`, or None if it has none; a line of warning for each plugin that is missed.

    Nothing here keeps a model from being loaded: a file that cannot be had or understood is a warning too.

    Args:
        name: A folder or Hub id.
        decision: What the model gets now.
        **hub: token, cache_folder, revision, local_files_only.
    """
    if decision.options.quiet:
        return None
    try:
        former = _find(name, **hub)
    except Exception as error:  # whatever the Hub's client raises: the model's own files are what it is asked for
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"its {FILE} is not read ({reason}), so that plugins it was trained with cannot be told"
        warnings.warn(f"model {name}: {what}. The model itself is not affected", PluginWarning, stacklevel=3)
        return None
    if former is not None and decision.options.purpose != "inference":
        for line in lost(former, decision):
            warnings.warn(f"model {name}: {line}", PluginWarning, stacklevel=3)
    return former


def remedy(name: str, plugins: Iterable[str] | None, **hub: Any) -> str | None:
    """What to do about a model that cannot be loaded at all because a plugin brought its classes; None if none is
    missed. `plugins` are those that the run names, `hub` is as in `recall`."""
    try:
        former = _find(name, **hub)
    except Exception:  # the fault that is being told is the greater one
        return None
    for kind, part in _strangers(former) if former is not None else ():
        if fault := _absence(part, registry(plugins)):
            return f"It was trained with {_label(kind, part)}, and {fault[0]}. {fault[1]}"
    return None


def _find(name: str, **hub: Any) -> Provenance | None:
    from sentence_transformers.util import load_file_path

    path = load_file_path(name, FILE, **hub)
    return None if path is None else parse(Path(path).read_text(encoding="utf-8"))


def lost(former: Provenance, decision: Decision) -> list[str]:
    """What the model was last trained with by plugins of others and does not get now: a line a distribution, with what
    takes its place and what to do."""
    lines: dict[str, tuple[list[str], list[str], str, str]] = {}
    for kind, part in _strangers(former):
        if fault := _absence(part, decision.registry) or (_passed_over(part, decision) if kind == "family" else None):
            were, are, _, _ = lines.setdefault(part["distribution"], ([], [], *fault))
            were.append(_label(kind, part))
            are.append(_now(kind, decision))
    return [
        f"trained with {' and '.join(were)}, and {reason}; instead it gets {' and '.join(are)}. {fix}"
        for were, are, reason, fix in lines.values()
    ]


def _strangers(former: Provenance) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(what it was, its record) of what plugins of others gave to the last training."""
    trainings = former.trainings
    parts = _parts(trainings[-1]) if trainings else ()
    yield from ((kind, part) for kind, part in parts if part["distribution"] != OWN)


def _label(kind: str, part: Mapping[str, str]) -> str:
    return f"{kind} {part['name']} of {part['plugin']} ({part['distribution']} {part['version']})"


def _absence(part: Mapping[str, str], known: Registry) -> tuple[str, str] | None:
    """(why a plugin is not to be had as it was, what to do), or None if it is."""
    owner = part["distribution"]
    installed = [plugin for plugin in known.plugins if plugin.distribution == owner]
    plugin = next((plugin for plugin in installed if plugin.name == part["plugin"]), None)
    if not installed:
        return f"{owner} is not installed", _install(part)
    if plugin is None:
        return f"{owner} {installed[0].version} has no plugin {part['plugin']}", _install(part)
    if plugin.state == "off":
        return f"{plugin.label} is off ({plugin.reason})", switch_on(plugin)
    if plugin.version != part["version"]:
        return f"{owner} is installed as {plugin.version}", _install(part)
    if plugin.state == "refused":
        return f"{plugin.label} is refused ({plugin.reason})", "Install versions that match"
    return None


def _passed_over(part: Mapping[str, str], decision: Decision) -> tuple[str, str] | None:
    """As `_absence`, for a plugin that is there and did not get the family."""
    chosen, wanted = decision.family.plugin, f"{part['distribution']}:{part['plugin']}"
    # A failure has been told already, and whoever names another plugin knows.
    if chosen.id == wanted or chosen.named or wanted in decision.registry.failures:
        return None
    label = f"{part['plugin']} ({part['distribution']} {part['version']})"
    return f"{label} is installed and not named", f"Name it: plugins=[{wanted!r}]"


def _install(part: Mapping[str, str]) -> str:
    # The file may be anybody's: nothing of it goes on a command line but what is a distribution's name and version.
    name, version = part["distribution"], part["version"]
    if not _NAME.fullmatch(name):
        return "Install the plugin that it was trained with"
    return f"Run `pip install {name}=={version}`" if _VERSION.fullmatch(version) else f"Run `pip install {name}`"


def _now(kind: str, decision: Decision) -> str:
    family, backend, attention = decision.family, decision.backend, decision.attention
    if kind == "family":
        return f"family {family.family.name} of {family.plugin.label}"
    if kind == "backend":
        return f"backend {backend.spec.name} of {backend.plugin.label}"
    return f"kernel {attention.spec.name} of {attention.plugin.label}" if attention else "no kernel"


def _parts(training: Record) -> Iterator[tuple[str, Mapping[str, str]]]:
    yield from ((kind, training[kind]) for kind in ("family", "backend") if training[kind] is not None)
    yield from (("kernel", kernel) for kernel in training["kernels"])
