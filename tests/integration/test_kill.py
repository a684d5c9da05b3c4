"""A run that is killed, or finds the disk full, leaves nothing half-written that loads."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from burnish.core.cli import run as program

HARNESS = Path(__file__).with_name("kill_points.py")
MEBIBYTE = 2**20


def harness(mode: str, model: Path, data: Path, runs: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, HARNESS, mode, model, data, runs], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_killed_at_every_file_operation(tiny_bert_st: Path, small_retrieval: Path, tmp_path: Path) -> None:
    answer = harness("operations", tiny_bert_st, small_retrieval, tmp_path / "runs")
    assert answer["faults"] == []
    states = answer["states"]
    # The kills go through the run: the earlier one untouched, half gone, gone, then the new one growing.
    assert answer["operations"] == sum(states.values()) > 100
    # Each event in staging, which readers do not see, and outside of it.
    assert {"open hidden", "os.rename hidden", "os.rename seen", "os.remove seen", "os.mkdir seen"} <= set(
        answer["kinds"]
    )
    assert answer["kills"] >= max(10, len(answer["kinds"]))
    assert any(
        state.startswith("earlier adapter, earlier checkpoints/checkpoint-1, earlier merged") for state in states
    )
    new = "new adapter, new checkpoints/checkpoint-1"
    assert {"no model", "new checkpoints/checkpoint-1", new, f"{new}, new merged"} <= set(states), states


def test_the_quickstart_killed_from_outside_and_run_again(minilm: Path, small_retrieval: Path, tmp_path: Path) -> None:
    answer = harness("moments", minilm, small_retrieval, tmp_path / "runs")
    assert answer["faults"] == []
    assert answer["left"] == ["adapter", "merged", "metrics.json", "report.html", "settings.json"]
    seen = {moment: found.split(", ") for moment, found in answer["seen"].items()}
    assert seen["load"] == [""] and "settings.json" in seen["training"]
    assert "staging" in seen["adapter"] and "adapter" not in seen["adapter"]
    assert "staging" in seen["merged"] and "merged" not in seen["merged"] and "adapter" in seen["merged"]
    assert "metrics.json" not in seen.get("report", [])


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Callable[[], None]]:
    """A disk of that size at `folder`; what is yielded makes it large enough. Without the right to mount one, a limit
    on the size of each file stands in."""
    folder.mkdir()
    mounted = shutil.which("mount") is not None and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def enlarge() -> None:
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=400m", folder], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (mebibytes * MEBIBYTE, hard))
    try:
        yield enlarge
    finally:
        enlarge()
        if mounted:
            subprocess.run(["umount", folder], check=True)


# The adapter of MiniLM takes 3 MiB with its tokenizer, a checkpoint's optimizer 5 more, the merged model 87.
@pytest.mark.parametrize(("mebibytes", "flags", "left"), [(40, (), ["adapter"]), (6, ("--save-steps", "1"), [])])
def test_a_full_disk(
    minilm: Path,
    small_retrieval: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mebibytes: int,
    flags: tuple[str, ...],
    left: list[str],
) -> None:
    disk = tmp_path / "disk"
    arguments = ["train", "--model", str(minilm), "--train", str(small_retrieval), "--runs", str(disk), "--name", "one"]
    arguments += ["--max-steps", "1", "--max-seq-length", "32", "--batch-size", "8", "--device", "cpu", *flags]
    with small_disk(disk, mebibytes) as enlarge:
        assert program(arguments) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and str(disk / "one") in line, line
        assert "space" in line and "Traceback" not in line
        found = sorted(path.name for path in (disk / "one").iterdir())
        assert [name for name in found if name not in ("checkpoints", "settings.json")] == left, found
        enlarge()
        assert program([*arguments, "--resume"]) == 2
        assert "has no whole checkpoint to go on from" in capsys.readouterr().err
        assert program([*arguments, "--overwrite"]) == 0
        assert json.loads((disk / "one" / "metrics.json").read_text())["training"]["steps"] == 1
        assert sorted(path.name for path in (disk / "one").iterdir() if path.name != "checkpoints") == [
            "adapter", "merged", "metrics.json", "report.html", "settings.json",
        ]  # fmt: skip
