"""Files and folders that appear whole or not at all, whatever kills the process in between."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A folder is a model to its readers once one of these is there: they leave first and arrive last.
MARKERS = ("adapter_config.json", "config.json", "modules.json")
# What an earlier save may have left and a reader would pick up beside (or instead of) the new files.
STALE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "adapter_model.*",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def _staging_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.burnish-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process: it lives
        return True
    return True


def _sweep(target: Path) -> None:
    """Remove what a killed process left beside `target`; a living process keeps its own."""
    for left in target.parent.glob(f".{target.name}.burnish-*-*"):
        process = left.name.rsplit("-", 2)[1]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    staging = _staging_name(path)
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _move_in(staging: Path, target: Path) -> None:
    """Put the staged files into a folder that already holds something, markers out first and in last.

    A folder with files of the user's keeps them; between the two steps it loads as no model at all.
    """
    for marker in MARKERS:
        (target / marker).unlink(missing_ok=True)
    fresh = {entry.name for entry in staging.iterdir()}
    for pattern in STALE:
        for old in target.glob(pattern):
            if old.name not in fresh:
                old.unlink()
    for entry in sorted(staging.iterdir(), key=lambda entry: (entry.name in MARKERS, entry.name)):
        destination = target / entry.name
        if destination.is_dir() and not destination.is_symlink():
            shutil.rmtree(destination)
        os.replace(entry, destination)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `target` when the block ends without an exception.

    An absent or empty `target` appears by one rename. One that holds files keeps those the block did not
    write. A crash leaves the staging folder (hidden, beside the target), swept by the next save.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    staging = _staging_name(target)
    staging.mkdir()
    try:
        yield staging
        if target.exists() and any(target.iterdir()):
            _move_in(staging, target)
        else:
            os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
