"""What is saved is there whole or not at all: on a full disk, beside the user's files."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from burnish.core import files
from burnish.core.errors import BurnishError, ConfigError
from burnish.core.files import atomic_folder, write_atomic, write_json

from .parts import PARTS, litter, read, save

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
