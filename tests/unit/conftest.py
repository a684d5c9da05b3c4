"""Distributions that look installed: metadata and a module in a folder on the path, as pip would leave them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from burnish.core.registry import forget

# What most fake plugins start with.
HEADER = """
from burnish.core.contracts import *
from burnish.core.contracts import BackendSpec, CommandSpec, ExporterSpec, Family, FamilySpec, KernelSpec, Needs
from burnish.core.hookspecs import hookimpl
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a fake distribution: `install("zeta-plugin", "model_type.zeta", code="…")` returns its module's name.

    Beside the claims and the module's code it takes `version`, `contract` (None for none), `plugins` (entry-point name
    to module, the module's own name by default), `capabilities` (to name other modules), and `metadata` and
    `entry_points` to write those files' text as it is. A module is imported, if at all, from the folder that the
    fixture puts on the path.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(
        name: str,
        *claims: str,
        code: str = "",
        version: str = "1.0",
        contract: str | None = "1",
        plugins: Mapping[str, str] | None = None,
        capabilities: Sequence[tuple[str, str]] = (),
        metadata: str | None = None,
        entry_points: str | None = None,
    ) -> str:
        module = name.replace("-", "_")
        (site / f"{module}.py").write_text(HEADER + dedent(code))
        points = plugins if plugins is not None else {name: module}
        offers = [*((claim, module) for claim in claims), *capabilities]
        offers += [(f"contract.{contract}", module)] if contract else []
        table = ["[burnish]", *(f"{key} = {value}" for key, value in points.items())]
        table += ["[burnish.capabilities]", *(f"{key} = {value}" for key, value in offers)]
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(header if metadata is None else metadata)
        (info / "entry_points.txt").write_text("\n".join(table) if entry_points is None else entry_points)
        importlib.invalidate_caches()
        forget()
        return module

    yield install
    forget()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(site)):
            del sys.modules[name]


SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SCRIPT_NAMES = (
    "arms", "cell", "clock", "context", "context_search", "cpu", "grid", "heatmap", "lines", "measuring",
    "memory_saved", "shapes", "table", "workload",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The scripts as they find each other when one is run; nothing of them is left to other tests."""
    place = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    try:
        found = {}
        for name in SCRIPT_NAMES:
            sys.path[:] = [str(SCRIPTS), *place]  # cell.py takes the folder off the path
            found[name] = importlib.import_module(name)
        yield found
    finally:
        sys.path[:] = place
        for name in SCRIPT_NAMES:
            sys.modules.pop(name, None)
