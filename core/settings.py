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
_SHAPE = 'It should hold {"disabled": ["NAME"]}'


def config_folder() -> Path:
    """The user's config folder: `$BURNISH_CONFIG_DIR`, else `$XDG_CONFIG_HOME/burnish`, else `~/.config/burnish`.

    Raises:
        ConfigError: If the user has no home folder, as some containers' users.
    """
    return user_folder("config folder", "BURNISH_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")


def user_folder(what: str, own: str, shared: str, home: str) -> Path:
    """A folder of the user's: what the variable `own` says, else `burnish` in `shared`'s, else in `home` at home.

    Raises:
        ConfigError: If the user has no home folder; `what` is how the error calls the folder.
    """
    if explicit := os.environ.get(own):
        return Path(explicit)
    if common := os.environ.get(shared):
        return Path(common) / "burnish"
    try:
        return Path.home() / home / "burnish"
    except RuntimeError as error:
        raise ConfigError("there is no home folder", where=what, fix=f"Set {own}") from error


def _file() -> Path:
    return config_folder() / "plugins.json"


def disabled_plugins() -> frozenset[str]:
    """Names that `burnish plugins disable` wrote down.

    Raises:
        ConfigError: If the file is not what this program writes.
    """
    try:
        path = _file()
    except ConfigError:
        return frozenset()  # without a config folder nothing was ever written down
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix=f"{_SHAPE}: mend or delete it") from error
    names = value.get("disabled") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError("has no list of names", where=str(path), fix=f"{_SHAPE}: mend or delete it")
    return frozenset(names)


def set_disabled(names: Iterable[str]) -> Path:
    """Write the names of disabled plugins; returns the file.

    Raises:
        ConfigError: If the file cannot be written.
    """
    path = _file()
    write_json(path, {"disabled": sorted(set(names))})
    return path


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
    """The policy of this process, and of a run that passes `plugins` (None: automatic; empty: Burnish's own only).

    Raises:
        ConfigError: If `plugins` is not a list of names.
    """
    if isinstance(plugins, str):
        fix = f"Pass a list: plugins=[{plugins!r}]"
        raise ConfigError(f"plugins={plugins!r} is a string", where="plugins", fix=fix)
    named = None if plugins is None else tuple(plugins)
    if odd := [name for name in named or () if not isinstance(name, str) or not name.strip()]:
        raise ConfigError(f"{odd[0]!r} is not a plugin's name", where="plugins", fix='Pass names: plugins=["NAME"]')
    variable = os.environ.get(ALLOW_VARIABLE)
    allowed = None if variable is None else frozenset(name.strip() for name in variable.split(",") if name.strip())
    return Policy(allowed=allowed, disabled=disabled_plugins(), named=named or (), only_own=named == ())
