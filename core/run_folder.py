"""A run's folder: claimed before the work, complete at its end, and never holding a model that is half there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import ADAPTER, DATA, MODEL, TRAINING, RunConfig, described
from .errors import BurnishError, ConfigError
from .files import discard, write_json

METRICS, REPORT, SETTINGS, CHECKPOINTS = "metrics.json", "report.html", "settings.json", "checkpoints"
ADAPTER_FOLDER, MERGED_FOLDER, MODEL_FOLDER = "adapter", "merged", "model"
# What a run leaves. metrics.json is written last and removed first: where it is, the run is complete.
CONTENTS = (METRICS, REPORT, ADAPTER_FOLDER, MERGED_FOLDER, MODEL_FOLDER, CHECKPOINTS, SETTINGS)
# In what safetensors raises when a write fails, and in what torch's archive writer raises, which loses the reason.
_WRITE_FAILED = ("os error", "inline_container", "iostream error")
# A run may go on longer than it was first asked to, and be measured on other queries; all else must be as it was.
_MAY_CHANGE = frozenset({"epochs", "max_steps", "eval", "eval_split"})


def check_folder(config: RunConfig) -> None:
    """Refuse, before any work, a run whose folder is not to be had. Nothing is touched.

    Raises:
        ConfigError: If an earlier run is there and neither `overwrite` nor `resume` is set, or if there is nothing to
            resume or its settings were others.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", where=str(folder), fix="Pass another --name or --runs")
    if config.resume:
        _check_same(folder, config)
        if whole_checkpoint(folder) is None:
            fix = "Drop --resume and start again; checkpoints are written with --save-steps"
            raise ConfigError("has no whole checkpoint to go on from", where=str(folder), fix=fix)
    elif not config.overwrite and any(_holds_something(folder / name) for name in CONTENTS if name != SETTINGS):
        fix = "Pass another --name, or --overwrite to replace it"
        raise ConfigError("holds an earlier run", where=str(folder), fix=fix)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def claim_folder(config: RunConfig) -> Path:
    """Make the run's folder and clear it of an earlier run; with `resume`, only of what the end will write anew.

    Raises:
        BurnishError: If it cannot be written to.
    """
    folder = config.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, REPORT) if config.resume else CONTENTS:
            discard(folder / name)
        write_json(folder / SETTINGS, plain_settings(config))
    return folder


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """The config's fields as plain values, in order."""
    return {name: getattr(config, name) for name in described()}


def tidy(folder: Path) -> None:
    """Remove a checkpoints folder that holds nothing."""
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def checkpoints_in(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest step first, whole or not."""
    found = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return next((path for path in reversed(checkpoints_in(folder)) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes this file after everything else.
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def _check_same(folder: Path, config: RunConfig) -> None:
    path = folder / SETTINGS
    if not path.exists():
        raise ConfigError(
            "holds no run to go on with", where=str(folder), fix="Drop --resume, or check --name and --runs"
        )
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"is not JSON ({error})", where=str(path), fix="Start again with --overwrite") from error
    now = plain_settings(config)
    for name, (_, option) in described().items():
        matters = option.panel in (DATA, MODEL, ADAPTER, TRAINING) and name not in _MAY_CHANGE
        if matters and isinstance(before, Mapping) and before.get(name) != now[name]:
            what = f"is {now[name]!r}, and was {before.get(name)!r} when the run began"
            raise ConfigError(what, where=name, fix="Resume with the settings it began with, or start again")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses, in whichever library's words, into one line that names the folder.

    Raises:
        BurnishError: In place of an `OSError`, of what safetensors and torch raise when a write fails, and of the
            `ConfigError` that a place gets which may not be written to: the run was asked for well, the disk refused.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):
            raise BurnishError(error.what, where=error.where, fix=error.fix) from error
        raise
    except OSError as error:
        raise _refused(Path(error.filename or folder), error.strerror or str(error)) from error
    except (SafetensorError, RuntimeError) as error:
        if any(sign in str(error) for sign in _WRITE_FAILED):
            raise _refused(folder, "the disk may be full") from error
        raise


def _refused(path: Path, reason: str) -> BurnishError:
    fix = "Free some space, check the permissions or choose another place, then run again; what is there is whole"
    return BurnishError(f"cannot be written ({reason})", where=str(path), fix=fix)
