"""A backend and a kernel of somebody else's: chosen when they are asked for, exact, and found out when they are not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHECK = "import sys; from burnish.core.cli import run; sys.exit(run(['plugins', 'check', 'burnish-watchful']))"


@pytest.fixture(scope="module")
def watched(watchful: Any, tiny_bert: Path) -> dict[str, Any]:
    """Loaded, trained and spoiled, where it is installed."""
    found: dict[str, Any] = watchful.report("watched.py", tiny_bert)
    return found


def check(watchful: Any, tmp_path: Path, **changes: str) -> tuple[int, str]:
    """Exit code and output of `burnish plugins check`, with `changes` (code by module) before what is installed."""
    path = [str(tmp_path), str(watchful.folder)]
    for name, code in changes.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    from_here = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=tmp_path, env=from_here)
    return done.returncode, done.stdout + done.stderr


def test_its_own_tests_pass_unchanged_where_it_is_installed(watchful: Any, tmp_path: Path) -> None:
    source = watchful.folder.parent / "burnish-watchful"
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", source, "-c", source / "pyproject.toml")
    said = watchful.run("-m", "pytest", *options, source / "tests", cwd=tmp_path)
    assert re.search(r"^12 passed in ", said, re.MULTILINE), said


def test_neither_is_used_because_it_is_installed(watched: dict[str, Any]) -> None:
    found = watched["by itself"]
    assert (found["backend"], found["kernel"]) == ("reference", "reference")


def test_each_is_used_when_it_is_asked_for(watched: dict[str, Any]) -> None:
    asked, named = watched["asked for"], watched["named"]
    assert (asked["backend"], asked["kernel"]) == ("watchful", "reference")
    assert named["kernel"] == "text-by-text"
    for found in (asked, named):
        assert np.abs(np.array(found["vectors"]) - watched["by itself"]["vectors"]).max() < 1e-6


def test_a_healthy_model_trains(watched: dict[str, Any]) -> None:
    assert 0 < watched["healthy"]["loss"] < 10


def test_a_spoiled_weight_is_named_and_nothing_is_left(watched: dict[str, Any]) -> None:
    spoiled = watched["spoiled"]
    start = "module 0.model.encoder.layer.1.intermediate.dense: its output is not finite in the forward pass, since its"
    assert spoiled["error"].startswith(start) and "\n" not in spoiled["error"]
    assert (spoiled["code"], spoiled["hooks left"]) == (4, 0)


def test_the_check_of_the_distribution_passes(watchful: Any, tmp_path: Path) -> None:
    code, said = check(watchful, tmp_path)
    assert code == 0, said
    assert re.search(r"kernel text-by-text +packed_attention +passed +96 cases", said), said
    assert len(re.findall(r"backend watchful +step of \S+ +passed", said)) == 7, said


def test_the_check_finds_out_a_wrong_step_and_a_wrong_kernel(watchful: Any, tmp_path: Path) -> None:
    backend = (watchful.folder / "burnish_watchful.py").read_text(encoding="utf-8")
    kernel = (watchful.folder / "burnish_text_by_text.py").read_text(encoding="utf-8")
    weak = backend.replace(
        "            return loss\n        model.zero_grad()",
        "            [value.grad.mul_(0.9) for value in model.parameters() if value.grad is not None]\n"
        "            return loss\n        model.zero_grad()",
    )
    blind = kernel.replace("if window is not None:", "if False:")
    assert weak != backend and blind != kernel
    code, said = check(watchful, tmp_path, burnish_watchful=weak, burnish_text_by_text=blind)
    assert code == 5, said
    assert re.search(r"kernel text-by-text +packed_attention +failed +o of .*'window': 5.* is off by", said), said
    assert re.search(r"backend watchful +step of bert +failed +losses", said), said
