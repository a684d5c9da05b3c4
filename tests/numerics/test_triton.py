"""Every file of `tests/interpreted`, in a process of its own in which Triton interprets its kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

INTERPRETED = Path(__file__).parents[1] / "interpreted"
FILES = sorted(path.name for path in INTERPRETED.glob("test_*.py"))
# Triton 3.6's interpreter takes int() of arrays of one number, which NumPy 2.4 refuses and NumPy 2.3 warns of.
TOO_OLD = Version(version("triton")) < Version("3.7") if find_spec("triton") else True


def test_there_are_files() -> None:
    assert FILES


@pytest.mark.skipif(TOO_OLD, reason="needs the interpreter of Triton 3.7")
@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
