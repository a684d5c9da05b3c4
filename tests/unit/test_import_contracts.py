"""Dependencies point one way: the contracts hold in the checkout, and each is seen broken in a copy that breaks it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "backends", "families", "kernels")
KERNELS = "kernels import nothing of ours"
CORE = "core imports neither families, backends nor kernels"
NARROW = "families and backends see of core only contracts, hookspecs and errors"
APART = "families and backends never import each other"


def broken_contracts(root: Path) -> set[str]:
    """The names of the contracts that import-linter reports as broken for the package at `root`."""
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        str(root / "pyproject.toml"),
    ]
    # Through .dev/burnish, as `make lint`: an installed burnish, the checkout's or another, must not be read instead.
    environment = {**os.environ, "PYTHONPATH": str(root / ".dev"), "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    verdicts = dict(re.findall(r"^(.+?) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE))
    assert verdicts.keys() == {KERNELS, CORE, NARROW, APART}, done.stdout + done.stderr
    broken = {name for name, verdict in verdicts.items() if verdict == "BROKEN"}
    assert bool(broken) == bool(done.returncode)
    return broken


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its links in a folder of its own, to be broken."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("__init__.py", "py.typed", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "quickstart_data"))
    shutil.copytree(ROOT / ".dev", root / ".dev", symlinks=True)
    return root


def test_the_checkout_keeps_its_contracts() -> None:
    assert broken_contracts(ROOT) == set()


def test_a_family_may_see_kernels_and_the_contract(copy: Path) -> None:
    allowed = "from .. import kernels\nfrom ..core import contracts, errors, hookspecs\n"
    for file in ("families/new.py", "backends/new.py"):
        (copy / file).write_text(allowed)
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("kernels/new.py", "from ..core import errors", {KERNELS}),
        ("kernels/new.py", "from .. import Trainer", {KERNELS}),
        ("kernels/new.py", "def f(): from ..backends import reference", {KERNELS}),
        ("core/new.py", "from ..families import bert", {CORE}),
        ("core/new.py", "def f(): from ..backends import reference", {CORE}),
        ("core/new.py", "from .. import kernels", {CORE}),
        ("families/new.py", "from ..core import registry", {NARROW}),
        ("families/new.py", "from .. import FastSentenceTransformer", {NARROW}),
        ("backends/new.py", "from ..core.trainer import Trainer", {NARROW}),
        ("families/new.py", "from ..backends import reference", {APART}),
        ("backends/new.py", "from ..families import bert", {APART}),
    ],
)
def test_a_broken_contract_is_reported(file: str, line: str, broken: set[str], copy: Path) -> None:
    (copy / file).write_text(line + "\n")
    assert broken_contracts(copy) == broken
