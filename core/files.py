"""Files and folders that appear whole or not at all, whatever kills the process in between.

New files are written to a hidden staging place on the same file system and moved in when they are complete and on the
disk. What a killed process left there is swept by the next save.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BurnishError, ConfigError

# A folder is a model to its readers once one of these is there. They arrive last, in this order, and leave first, in
# the opposite one: without `modules.json` the weights would load with some default pooling, without
# `adapter_config.json` as the base model alone.
MARKERS = ("modules.json", "adapter_config.json", "config.json")
# What an earlier save may have left and a reader would pick up beside (or instead of) the new files.
STALE = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "sentence_bert_config.json",
    "burnish.json",
    "deploy.json",
    "golden.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_STAGING = ".burnish-staging"
# Another machine's processes cannot be asked whether they live; no save takes a day.
_STALE_SECONDS = 24 * 3600
_mine: set[Path] = set()


def _staging_path(folder: Path) -> Path:
    host = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32] or "host"
    return folder / f"{_STAGING}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _abandoned(path: Path) -> bool:
    """Whether the process that made this staging place is gone. Containers share host names and process numbers, so one
    with our own number that we did not make is a predecessor's."""
    import psutil  # type: ignore[import-untyped]

    if path in _mine:
        return False
    host, process = path.name.rsplit("-", 3)[1:3]
    here = _staging_path(path.parent).name.rsplit("-", 3)[1]
    if host == here and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
        return True
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:  # its owner has just finished
        return False


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{_STAGING}-*-[0-9]*-*"):
        if _abandoned(left):
            with suppress(OSError):  # litter of another user's, which only that user may remove
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _staging(target: Path, folder: Path) -> Iterator[Path]:
    """A staging path in `folder` for `target`, gone afterwards; errors of the disk in one line.

    Raises:
        ConfigError: If `folder` cannot be made or written to.
        BurnishError: If the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        path = _staging_path(folder)
        path.touch()
        path.unlink()
    except OSError as error:
        if _disk_full(error):
            raise _full(target) from error
        what = f"cannot be written ({error.strerror}: {error.filename})"
        raise ConfigError(what, where=str(target), fix="Choose a place that you may write to") from error
    _mine.add(path)
    try:
        yield path
    except Exception as error:
        if _disk_full(error):
            raise _full(target) from error
        raise
    finally:
        _mine.discard(path)
        with suppress(OSError):  # what cannot be removed now, the next save sweeps
            _remove(path)


def _disk_full(error: BaseException) -> bool:
    # safetensors raises its own error, with the operating system's words in it.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _full(target: Path) -> BurnishError:
    fix = "Free some and save again; nothing half-written was left"
    return BurnishError("no space is left on the disk", where=str(target), fix=fix)


def _flush(path: Path) -> None:
    """Have the system write a file out: some file systems find that they are full only then."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`: readers see the old file or the new one, never a part.

    Raises:
        ConfigError: If `path` is a folder or cannot be written to.
        BurnishError: If the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigError("is a folder, not a file", where=str(path), fix="Choose another name")
    with _staging(path, target.parent) as staging:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
        _flush(staging)
        os.replace(staging, target)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. Raises as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _move_in(staging: Path, target: Path) -> None:
    """Put the staged files into a folder that is there. Where they are a model, markers go out first and in last, so
    that the folder loads as no model at all in between; files that are part of no model stay."""
    fresh = {entry.name: entry for entry in staging.iterdir()}
    last = [name for name in MARKERS if name in fresh]
    if last:
        for marker in reversed(MARKERS):
            (target / marker).unlink(missing_ok=True)
        for old in (old for pattern in STALE for old in target.glob(pattern)):
            if old.name not in fresh and not old.is_dir():
                old.unlink()
    for name in (*sorted(fresh.keys() - set(last)), *last):
        destination = target / name
        if destination.is_symlink() or destination.is_dir() or fresh[name].is_dir():
            _remove(destination)
        os.replace(fresh[name], destination)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, at one stroke to readers: what is killed half-way is hidden,
    and swept by the next save.

    Raises:
        OSError: If it cannot be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = _staging_path(path.parent)
    os.replace(path, doomed)
    _remove(doomed)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `target` when the block ends without an exception.

    An absent `target` appears by one rename. One that is there keeps its files other than a former model's, and loads
    as the old model, the new one, or none at all; it may be the root of a mounted disk.

    Raises:
        ConfigError: If `target` is a file, or cannot be written to.
        BurnishError: If the disk is full.
    """
    place = Path(os.path.realpath(target))
    if place.exists() and not place.is_dir():
        raise ConfigError("is a file, not a folder", where=str(target), fix="Choose another folder, or remove the file")
    there = place.is_dir()
    if there:
        _sweep(place.parent)
    with _staging(target, place if there else place.parent) as staging:
        staging.mkdir()
        yield staging
        for file in staging.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        if place.is_dir():
            _move_in(staging, place)
        else:
            os.replace(staging, place)
