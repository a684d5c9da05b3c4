"""What is saved is there whole or not at all: after SIGKILL at every step, on a full disk, beside the user's files."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from burnish.core import files
from burnish.core.errors import BurnishError, ConfigError
from burnish.core.files import MARKERS, atomic_folder, write_atomic, write_json

PARTS = ("model.safetensors", "tokenizer.json", "1_Pooling/config.json", "modules.json", "config.json")


def save(target: Path, version: str, parts: tuple[str, ...] = PARTS) -> None:
    """Save something shaped like a model, every file of which says its version."""
    with atomic_folder(target) as staging:
        for part in parts:
            (staging / part).parent.mkdir(exist_ok=True)
            (staging / part).write_text(version)


def read(target: Path, parts: tuple[str, ...] = PARTS) -> set[str | None]:
    """The versions in a folder that a reader would take for a model; empty where there is no model to read."""
    if not any((target / marker).exists() for marker in ("config.json", "adapter_config.json")):
        return set()
    return {(target / part).read_text() if (target / part).exists() else None for part in parts}


def litter(folder: Path) -> list[str]:
    return [entry.name for entry in folder.rglob(".burnish-*")]


# Files.


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.json"
    write_json(path, {"é": [1, 2]})
    assert path.read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    2\n  ]\n}\n'
    write_atomic(path, "second")
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_that_fails_half_way_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half \ud800")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "first" and litter(tmp_path) == []


def test_a_linked_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "dotfiles" / "real.json")
    write_atomic(tmp_path / "link.json", "text")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "dotfiles" / "real.json").read_text() == "text"


# Folders.


@pytest.mark.parametrize("name", ["model", "run[1]", "x" * 255, "a/b/c"])
def test_a_folder_appears(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    save(target, "1")
    assert read(target) == {"1"} and litter(tmp_path) == []
    save(target, "2")
    assert read(target) == {"2"} and litter(tmp_path) == []


def test_an_empty_folder_is_filled_in_its_place(tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    before = target.stat().st_ino
    save(target, "1")
    # The very folder: the root of a mounted disk cannot be replaced by a rename.
    assert target.stat().st_ino == before and read(target) == {"1"}


def test_staging_is_on_the_disk_of_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with atomic_folder(tmp_path / "there") as staging:
        assert staging.parent == tmp_path / "there"
    with atomic_folder(tmp_path / "absent") as staging:
        assert staging.parent == tmp_path
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with atomic_folder(tmp_path / "link") as staging:
        assert staging.parent == tmp_path / "there"
    assert (tmp_path / "link").is_symlink()


def test_a_relative_folder_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with atomic_folder(Path("model")) as staging:
        (staging / "config.json").write_text("1")
        os.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "model" / "config.json").read_text() == "1"


def test_the_users_files_stay_and_a_former_models_go(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(target, "old")
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "spiece.model"]
    stale += ["adapter_config.json", "adapter_model.safetensors", "added_tokens.json", "sentence_bert_config.json"]
    kept = [
        "notes.txt",
        "model_backup.safetensors",
        "data/train.jsonl",
        "tokenizer_notes.md",
        "onnx/model.onnx",
        ".git/HEAD",
    ]
    for name in (*stale, *kept):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("x")
    save(target, "new")
    assert read(target) == {"new"}
    assert [name for name in stale if (target / name).exists()] == []
    assert [name for name in kept if not (target / name).exists()] == []


def test_what_is_no_model_replaces_no_model(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(target, "old")
    with atomic_folder(target) as staging:  # an export beside the model it was made of
        (staging / "model.gguf").write_text("new")
    assert read(target) == {"old"} and (target / "model.gguf").read_text() == "new"


def test_folders_files_and_links_of_the_same_names_give_way(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "model.safetensors").mkdir(parents=True)
    (target / "1_Pooling").write_text("a file")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").touch()
    (target / "2_Normalize").symlink_to(tmp_path / "outside")
    parts = (*PARTS, "2_Normalize/config.json")
    save(target, "1", parts)
    assert read(target, parts) == {"1"}
    assert [entry.name for entry in (tmp_path / "outside").iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(error: type[BaseException], there: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if there:
        save(target, "old")
    with pytest.raises(error), atomic_folder(target) as staging:
        (staging / "config.json").write_text("new")
        raise error
    assert read(target) == ({"old"} if there else set())
    assert target.exists() == there and litter(tmp_path) == []


# What cannot be written.


def test_a_file_in_a_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        save(tmp_path / "model", "1")
    message = f"{tmp_path}/model: is a file, not a folder. Choose another folder, or remove the file"
    assert str(caught.value) == message
    assert (tmp_path / "model").read_text() == "mine"


def test_a_folder_in_a_files_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder, not a file. Choose another name"):
        write_json(tmp_path / "a.json", {})


WRITERS: list[Callable[[Path], None]] = [lambda path: save(path, "1"), lambda path: write_atomic(path, "1")]


@pytest.mark.parametrize("write", WRITERS)
def test_a_parent_that_is_a_file_is_told_in_one_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "file" / "model")
    assert str(caught.value).startswith(f"{tmp_path}/file/model: cannot be written (")
    assert str(caught.value).endswith("Choose a place that you may write to")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_place_without_permission_is_told_in_one_line(
    there: bool, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Tests may run as root, whom no mode of a folder stops.
    monkeypatch.setattr(Path, "touch" if there else "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied: .*\). Choose a place"):
        write(tmp_path / "model")
    assert os.listdir(tmp_path) == []


# The disk is full.


def full_after(room: int) -> Callable[..., int]:
    """A `Path.write_text` that lets so many writes through, then answers as the system does when no space is left."""
    write = Path.write_text
    done: list[Path] = []

    def write_text(path: Path, *args: Any, **keywords: Any) -> int:
        if len(done) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        done.append(path)
        return write(path, *args, **keywords)

    return write_text


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("room", range(len(PARTS) + 1))
def test_a_full_disk_leaves_the_old_state(
    room: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    if there:
        save(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_after(room))
        if room < len(PARTS):
            with pytest.raises(BurnishError) as caught:
                save(target, "new")
            what = "no space is left on the disk. Free some and save again; nothing half-written was left"
            assert str(caught.value) == f"{target}: {what}"
        else:
            save(target, "new")
    assert read(target) == ({"new"} if room == len(PARTS) else {"old"} if there else set())
    assert litter(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_notices_only_when_it_is_flushed(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    if there:
        save(target, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BurnishError, match=r"no space is left on the disk"):
            save(target, "new")
        with pytest.raises(BurnishError, match=r"no space is left on the disk"):
            write_atomic(tmp_path / "a.json", "new")
    assert read(target) == ({"old"} if there else set())
    assert litter(tmp_path) == [] and not (tmp_path / "a.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of one megabyte, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if not done or done.returncode:
        # No leave to mount one: the device that is always full instead, behind a link that only plain writes follow.
        (disk / "full").symlink_to("/dev/full")
        yield disk
        return
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    target = small_disk / "model"
    mounted = os.path.ismount(small_disk)
    save(target, "old")
    with pytest.raises(BurnishError, match=r"no space is left on the disk") as caught, atomic_folder(target) as staging:
        path = staging / "model.safetensors" if mounted else small_disk / "full"
        save_file({"weight": torch.zeros(1024, 1024)}, path) if mounted else path.write_text("x" * 100_000)
    assert "\n" not in str(caught.value)
    assert read(target) == {"old"} and litter(small_disk) == []
    save(target, "new")
    assert read(target) == {"new"}


def test_a_full_disk_is_known_by_number_or_by_words() -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert files._disk_full(SafetensorError(words))
    assert files._disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not files._disk_full(OSError(errno.EACCES, "Permission denied")) and not files._disk_full(RuntimeError("no"))


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
