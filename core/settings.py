"""Which plugins the user allows: the environment, the user's config folder, and what a run names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .files import write_json

ALLOW_VARIABLE = "BURNISH_PLUGINS"


def config_folder() -> Path:
    """The user's config folder: `$BURNISH_CONFIG_DIR`, else `$XDG_CONFIG_HOME/burnish`, else `~/.config/burnish`."""
    if explicit := os.environ.get("BURNISH_CONFIG_DIR"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "burnish"


def _file() -> Path:
    return config_folder() / "plugins.json"


def disabled_plugins() -> frozenset[str]:
    """Names that `burnish plugins disable` wrote down.

    Raises:
        ConfigError: If the file is not what this program writes.
    """
    path = _file()
    if not path.exists():
        return frozenset()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["disabled"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("'disabled' is not a list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix='It should hold {"disabled": ["NAME"]}: mend or delete it') from error
    return frozenset(names)


def set_disabled(names: Iterable[str]) -> Path:
    """Write the names of disabled plugins; returns the file."""
    write_json(_file(), {"disabled": sorted(set(names))})
    return _file()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which plugins may run.

    Args:
        allowed: If not None, the whole allow-list (`BURNISH_PLUGINS`): names of plugins or distributions.
        disabled: Names the user switched off for good.
        named: What this run names (`plugins=[…]`): must be there, must load, and may replace a built-in.
        only_own: Run no plugin of another distribution (`--no-plugins`, `plugins=[]`).
    """

    allowed: frozenset[str] | None = None
    disabled: frozenset[str] = frozenset()
    named: tuple[str, ...] = ()
    only_own: bool = False


def current_policy(plugins: Iterable[str] | None = None) -> Policy:
    """The policy of this process, and of a run that passes `plugins` (None: automatic; empty: Burnish's own only)."""
    if isinstance(plugins, str):
        raise ConfigError(f"plugins={plugins!r} is a string", where="plugins", fix=f"Pass a list: plugins=[{plugins!r}]")
    named = None if plugins is None else tuple(plugins)
    variable = os.environ.get(ALLOW_VARIABLE)
    allowed = None if variable is None else frozenset(name.strip() for name in variable.split(",") if name.strip())
    return Policy(allowed=allowed, disabled=disabled_plugins(), named=named or (), only_own=named == ())
