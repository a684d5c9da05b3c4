"""`burnish plugins check`: everything that an installed plugin offers, examined, as rows of a table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..contracts import BackendSpec, FamilySpec, KernelSpec
from ..discovery import Plugin
from ..errors import BurnishError, ConfigError
from ..registry import registry

Row = tuple[str, str, str, str]


def check_distribution(name: str, *, backend: str = "auto", only: Sequence[str] = ()) -> list[Row]:
    """Examine every family, backend and kernel of a plugin or a distribution.

    Args:
        name: A plugin or a distribution, as `burnish plugins` lists them.
        backend: By which backend families are trained.
        only: Names of checks of families; empty means all.

    Returns:
        (what, check, result, measured) for each check; the result is "passed", "failed" or "not applicable".

    Raises:
        PluginError: If it is not installed, or is off, refused or broken.
        ConfigError: If what the suite needs is not installed, a check is unknown, or there is nothing to examine.
    """
    if find_spec("hypothesis") is None or find_spec("pytest") is None:
        what = "the conformance suite needs pytest and hypothesis"
        raise ConfigError(what, where="plugins check", fix="Run: pip install 'burnish[testing]'")
    from .suite import CHECKS

    if unknown := sorted(set(only) - CHECKS.keys()):
        raise ConfigError(f"there is no check {unknown[0]!r}", where="--only", fix=f"Known: {', '.join(CHECKS)}")
    rows: list[Row] = []
    for plugin in registry().named(name):
        rows += _families(plugin, backend, only)
        if not only:
            rows += [*_backends(plugin), *_kernels(plugin)]
    if not rows:
        fix = "Families, backends and kernels have checks; exporters, commands and observers have none"
        raise ConfigError("offers nothing that can be examined", where=f"plugin {name}", fix=fix)
    return rows


def failed(rows: Sequence[Row]) -> bool:
    """Whether a check failed."""
    return any(row[2] == "failed" for row in rows)


def _named(plugin: Plugin) -> tuple[str, ...] | None:
    """How the plugin is named for a run, so that it is the one that is used."""
    return None if plugin.own else (plugin.id,)


def _families(plugin: Plugin, backend: str, only: Sequence[str]) -> Iterator[Row]:
    from . import suite
    from .find import offers, sampled
    from .subject import Subject

    plugins = _named(plugin)
    if not plugin.values("model_type"):
        return
    for spec in offers(_again(plugin, plugins), "burnish_register_families", FamilySpec, plugins):
        if spec.fallback:
            continue
        config = sampled(plugin, spec)
        with tempfile.TemporaryDirectory(prefix="burnish-check-") as folder:
            subject = Subject(config=config, folder=Path(folder), backend=backend, plugins=plugins)
            for result in suite.run(subject, only):
                yield f"family {spec.name}", result.check, result.state, result.words


def _backends(plugin: Plugin) -> Iterator[Row]:
    from .backends import check_step, model_types
    from .find import offers

    plugins = _named(plugin)
    if not plugin.values("backend"):
        return
    for spec in offers(_again(plugin, plugins), "burnish_register_backends", BackendSpec, plugins):
        for model_type in model_types():
            with tempfile.TemporaryDirectory(prefix="burnish-check-") as folder:
                run = partial(check_step, spec.name, model_type, Path(folder), plugins=plugins)
                yield _row(f"backend {spec.name}", f"step of {model_type}", run)


def _kernels(plugin: Plugin) -> Iterator[Row]:
    import torch

    from .find import offers
    from .operations import check_operation

    plugins = _named(plugin)
    if not plugin.values("operation"):
        return
    for spec in offers(_again(plugin, plugins), "burnish_register_kernels", KernelSpec, plugins):
        what = f"kernel {spec.name}"
        if plugin.own and spec.priority == 0:
            yield what, spec.operation, "not applicable", "the plain implementation, which others are compared with"
        elif spec.needs.devices and "cpu" not in spec.needs.devices and not torch.cuda.is_available():
            yield what, spec.operation, "not applicable", f"needs {' or '.join(spec.needs.devices)}"
        else:
            device = "cuda" if spec.needs.devices and "cpu" not in spec.needs.devices else "cpu"
            run = partial(check_operation, spec.operation, spec.name, plugins=plugins, device=device)
            yield _row(what, spec.operation, run)


def _row(what: str, check: str, run: Callable[[], str]) -> Row:
    try:
        return what, check, "passed", run()
    except Exception as error:  # whatever a stranger's plugin raises is its failure of this check
        words = " ".join(str(error).split()) or type(error).__name__
        kind = "" if isinstance(error, AssertionError | BurnishError) else f"{type(error).__name__}: "
        return what, check, "failed", f"{kind}{words}"


def _again(plugin: Plugin, plugins: Sequence[str] | None) -> Plugin:
    """The same plugin in the registry of a run that names it."""
    return next(other for other in registry(plugins).plugins if other.id == plugin.id)
