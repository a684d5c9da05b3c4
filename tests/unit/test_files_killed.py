"""What is saved is there whole or not at all, after SIGKILL at every step; and what the dead leave is swept."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.core import files
from burnish.core.files import MARKERS, atomic_folder, write_atomic

from .parts import PARTS, litter, read, save

# SIGKILL.

# Counts what changes the disk, and dies as by SIGKILL just before the given one.
MORTAL = """
import os, shutil, sys
from pathlib import Path
left = int(sys.argv[3])
def mortal(function):
    def called(*args, **keywords):
        global left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return function(*args, **keywords)
    return called
os.replace, os.fsync, shutil.rmtree = mortal(os.replace), mortal(os.fsync), mortal(shutil.rmtree)
Path.unlink, Path.mkdir = mortal(Path.unlink), mortal(Path.mkdir)
from burnish.core.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as staging:
    for part in sorted(Path(sys.argv[2]).rglob("*")):
        place = staging / part.relative_to(sys.argv[2])
        os.mkdir(place) if part.is_dir() else shutil.copyfile(part, place)
"""


def die_at(step: int, target: Path, source: Path) -> bool:
    """Save `source` as `target` in a process that is killed before its step number `step`; False if it ended first."""
    command = [sys.executable, "-c", MORTAL, str(target), str(source), str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("there", [True, False])
def test_killed_before_every_step_it_never_loads_as_half_written(there: bool, tmp_path: Path) -> None:
    new = tmp_path / "source"
    save(new, "new")
    outcomes: list[frozenset[str | None]] = []
    for step in range(1000):
        target = tmp_path / f"{step}" / "model"
        if there:
            save(target, "old")
            (target / "notes.txt").write_text("mine")
        died = die_at(step, target, new)
        outcomes.append(frozenset(read(target)))
        assert not there or (target / "notes.txt").read_text() == "mine"
        save(target, "next")
        assert read(target) == {"next"} and litter(target.parent) == []
        if not died:
            break
    steps = [next(iter(outcome), "none") for outcome in outcomes if len(outcome) <= 1]
    assert len(steps) == len(outcomes), outcomes
    # The old one, then (while files are moved in) none, then the new one: each was seen, and in this order only.
    order = list(dict.fromkeys(steps))
    assert order == (["old", "none", "new"] if there else ["none", "new"])
    assert len(steps) > 10


LOOP = """
import sys
from pathlib import Path
from burnish.core.files import atomic_folder
base, fresh, parts = Path(sys.argv[1]), sys.argv[2] == "fresh", sys.argv[3:]
print("ready", flush=True)
for version in range(1_000_000):
    with atomic_folder(base / str(version) if fresh else base) as staging:
        for part in parts:
            (staging / part).parent.mkdir(exist_ok=True)
            (staging / part).write_text(str(version) * 2000)
"""


@pytest.mark.parametrize("kind", ["fresh", "existing"])
def test_killed_at_random_it_never_loads_as_half_written(kind: str, tmp_path: Path) -> None:
    chance, base, under_way = random.Random(7), tmp_path / "model", 0
    base.mkdir()
    (base / "notes.txt").write_text("mine")
    # Many small files, so that a kill falls between two of them.
    parts = (*PARTS, *(f"shard-{number}.bin" for number in range(40)))
    for _ in range(16):
        command = [sys.executable, "-c", LOOP, str(base), kind, *parts]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.06))
            child.kill()
            child.wait()
        folders = [base] if kind == "existing" else [entry for entry in base.glob("[0-9]*") if entry.is_dir()]
        assert all(len(read(folder, parts)) <= 1 for folder in folders), [read(folder, parts) for folder in folders]
        # A fresh folder is there whole from its first moment.
        assert kind == "existing" or all(len(read(folder, parts)) == 1 for folder in folders)
        assert (base / "notes.txt").read_text() == "mine"
        under_way += len(litter(base)) > 0
        if kind == "fresh":
            for folder in folders:
                shutil.rmtree(folder)
    assert under_way > 0, "no kill fell while a save was under way"
    save(base, "last", parts)
    assert read(base, parts) == {"last"} and litter(tmp_path) == []


def test_a_real_model_killed_before_every_step_loads_whole_or_not_at_all(tiny_bert_st: Path, tmp_path: Path) -> None:
    """The new model differs in weights and in pooling, which plain Sentence Transformers takes from `modules.json`:
    without that file it would load the weights with mean pooling and say nothing."""
    from sentence_transformers import SentenceTransformer

    new = tmp_path / "source"
    shutil.copytree(tiny_bert_st, new)
    weights = {name: tensor * 1.5 for name, tensor in load_file(new / "model.safetensors").items()}
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    pooling = json.loads((new / "1_Pooling" / "config.json").read_text())
    (new / "1_Pooling" / "config.json").write_text(json.dumps(pooling).replace('"mean"', '"cls"'))

    def embedding(folder: Path) -> torch.Tensor | None:
        try:
            model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        except (OSError, ValueError):
            return None
        return model.encode("a text to tell them apart", convert_to_tensor=True)

    whole = {"old": embedding(tiny_bert_st), "new": embedding(new)}
    assert whole["old"] is not None and whole["new"] is not None and not torch.allclose(whole["old"], whole["new"])
    names = []
    for step in range(1000):
        target = tmp_path / f"{step}"
        shutil.copytree(tiny_bert_st, target)
        died = die_at(step, target, new)
        found = embedding(target)
        match = [name for name, value in whole.items() if found is not None and torch.equal(found, value)]  # type: ignore[arg-type]
        assert found is None or match, f"step {step}: loads as neither the old nor the new model"
        names.append(match[0] if match else "none")
        shutil.rmtree(target)
        if not died:
            break
    assert list(dict.fromkeys(names)) == ["old", "none", "new"]


# Sweeping.


def staging_of(folder: Path, process: int, host: str | None = None) -> Path:
    """A staging folder as a save of that process on that machine would have left it."""
    name = files._staging_path(folder).name.rsplit("-", 3)
    path = folder / "-".join([name[0], host or name[1], str(process), name[3]])
    path.mkdir()
    (path / "model.safetensors").write_text("half")
    return path


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_dead_process_left_is_swept(dead: int, inside: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(target, "1")
    left = staging_of(target if inside else tmp_path, dead)
    save(target, "2")
    assert not left.exists() and read(target) == {"2"}


def test_what_a_living_process_is_writing_is_kept(tmp_path: Path) -> None:
    living = staging_of(tmp_path, os.getppid())
    save(tmp_path / "model", "1")
    write_atomic(tmp_path / "a.json", "1")
    assert (living / "model.safetensors").exists()


def test_a_save_within_a_save_keeps_the_outer_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "outer") as outer:
        (outer / "config.json").write_text("outer")
        save(tmp_path / "inner", "inner")
        write_atomic(tmp_path / "a.json", "1")
        assert (outer / "config.json").exists()
    assert (tmp_path / "outer" / "config.json").read_text() == "outer" and read(tmp_path / "inner") == {"inner"}


def test_what_a_predecessor_with_our_number_left_is_swept(tmp_path: Path) -> None:
    left = staging_of(tmp_path, os.getpid())  # process 1 of a container that was started again
    save(tmp_path / "model", "1")
    assert not left.exists()


def test_another_machines_is_kept_for_a_day(dead: int, tmp_path: Path) -> None:
    fresh, old = (staging_of(tmp_path, dead, host) for host in ("nodea", "nodeb"))
    os.utime(old, (time.time() - 2 * files._STALE_SECONDS,) * 2)
    save(tmp_path / "model", "1")
    assert fresh.exists() and not old.exists()


def test_the_markers_leave_in_the_opposite_order_of_their_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    parts = ("adapter_model.safetensors", *MARKERS)
    save(target, "old", parts)
    seen: list[str] = []
    unlink, replace = Path.unlink, os.replace

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        seen.append(f"-{path.name}")
        unlink(path, missing_ok=missing_ok)

    def replaced(source: Path, place: Path) -> None:
        seen.append(f"+{place.name}")
        replace(source, place)

    monkeypatch.setattr(Path, "unlink", unlinked)
    monkeypatch.setattr(os, "replace", replaced)
    save(target, "new", parts)
    moves = [move for move in seen if ".burnish" not in move]
    assert moves == [
        "-config.json",
        "-adapter_config.json",
        "-modules.json",
        "+adapter_model.safetensors",
        "+modules.json",
        "+adapter_config.json",
        "+config.json",
    ]
