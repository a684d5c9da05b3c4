from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from burnish.core import run_folder
from burnish.core.config import RunConfig
from burnish.core.errors import BurnishError, ConfigError
from burnish.core.files import discard, write_json
from burnish.core.run_folder import check_folder, checkpoints_in, claim_folder, disk_errors, tidy, whole_checkpoint


def config(runs: Path, **values: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "train": "t", "name": "one", "runs": str(runs), **values})


def refused(asked: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_folder(asked)
    return str(caught.value)


def make_checkpoint(folder: Path, step: int, state: str | None = '{"global_step": 1}') -> Path:
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_a_new_folder_is_claimed_with_its_settings(tmp_path: Path) -> None:
    asked = config(tmp_path / "deep" / "runs", rank=8)
    check_folder(asked)
    assert not asked.folder.exists(), "looking made a folder"
    assert claim_folder(asked) == asked.folder
    settings = json.loads((asked.folder / "settings.json").read_text())
    assert settings["rank"] == 8 and list(settings)[:2] == ["train", "split"]


@pytest.mark.parametrize("name", run_folder.CONTENTS)
def test_an_earlier_run_is_kept_unless_overwritten(tmp_path: Path, name: str) -> None:
    asked = config(tmp_path)
    path = asked.folder / name
    asked.folder.mkdir()
    if "." in name:
        path.write_text("{}")
    else:
        path.mkdir()
        check_folder(asked)  # an empty folder is no result
        (path / "config.json").write_text("{}")
    (asked.folder / "my-notes.txt").write_text("kept")
    if name == "settings.json":
        check_folder(asked)  # a run that ended before it made anything
    else:
        assert (
            refused(asked) == f"{asked.folder}: holds an earlier run. Pass another --name, or --overwrite to replace it"
        )
    again = config(tmp_path, overwrite=True)
    check_folder(again)
    assert path.exists(), "looking removed something"
    claim_folder(again)
    assert sorted(entry.name for entry in asked.folder.iterdir()) == ["my-notes.txt", "settings.json"]


def test_places_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    assert refused(config(tmp_path)) == f"{tmp_path / 'one'}: is a file. Pass another --name or --runs"
    with pytest.raises(
        BurnishError, match=r"one/one: cannot be written \(Not a directory\)\. Free some space"
    ) as caught:
        claim_folder(config(tmp_path / "one"))
    assert caught.value.exit_code == 1


def test_places_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever notices it, our own code or the writing of whole files, exit code and form are the same."""

    def deny(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(BurnishError, match=r"one: cannot be written \(Permission denied\)\. ") as ours:
        claim_folder(config(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(Path, "touch", deny)
    with pytest.raises(BurnishError, match=r"one/settings\.json: cannot be written \(Permission denied: ") as theirs:
        claim_folder(config(tmp_path))
    assert ours.value.exit_code == theirs.value.exit_code == 1


def test_resuming_needs_a_whole_checkpoint_and_the_same_settings(tmp_path: Path) -> None:
    asked = config(tmp_path, resume=True)
    assert "holds no run to go on with" in refused(asked)
    claim_folder(config(tmp_path))
    assert "has no whole checkpoint to go on from. Drop --resume" in refused(asked)
    make_checkpoint(asked.folder, 5)
    check_folder(asked)
    check_folder(config(tmp_path, resume=True, epochs=3, max_steps=100, device="cpu", eval="e", log_steps=1))
    assert refused(config(tmp_path, resume=True, rank=8)).startswith(
        "rank: is 8, and was 16 when the run began. Resume"
    )
    assert refused(config(tmp_path, resume=True, train="u")).startswith("train: is 'u', and was 't' when")
    assert refused(config(tmp_path, resume=True, seed=1)).startswith("seed: is 1, and was 42")
    (asked.folder / "settings.json").write_text("{")
    assert "settings.json: is not JSON (" in refused(asked)


def test_resuming_takes_away_only_what_would_say_that_the_run_is_complete(tmp_path: Path) -> None:
    asked = config(tmp_path, resume=True)
    for name in ("adapter", "merged", "checkpoints"):
        (asked.folder / name).mkdir(parents=True)
    for name in ("metrics.json", "report.html"):
        (asked.folder / name).write_text("{}")
    claim_folder(asked)
    assert sorted(path.name for path in asked.folder.iterdir()) == ["adapter", "checkpoints", "merged", "settings.json"]


@pytest.mark.parametrize("state", [None, "", '{"global_st', "[]", "{}"])
def test_a_checkpoint_that_broke_off_is_passed_over(tmp_path: Path, state: str | None) -> None:
    assert whole_checkpoint(tmp_path) is None
    first = make_checkpoint(tmp_path, 9)
    second = make_checkpoint(tmp_path, 10)
    assert whole_checkpoint(tmp_path) == second, "10 comes after 9"
    broken = make_checkpoint(tmp_path, 11, state)
    assert whole_checkpoint(tmp_path) == second
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    assert checkpoints_in(tmp_path) == [first, second, broken]


def test_a_folder_is_discarded_at_one_stroke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment of a removal, what is left under the old name is whole or nothing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("x")
    seen: list[tuple[bool, list[str]]] = []
    rmtree = shutil.rmtree

    def spy(path: Path) -> None:
        seen.append((model.exists(), [entry.name for entry in path.iterdir()]))
        assert path.parent == tmp_path and path.name.startswith(".burnish-staging-")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", spy)
    discard(model)
    assert seen == [(False, ["config.json"])] and list(tmp_path.iterdir()) == []


def test_what_a_killed_removal_left_is_swept_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    discard(model)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    write_json(tmp_path / "next.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["next.json"]


def test_discarding_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    discard(tmp_path / "link")
    discard(tmp_path / "nothing-there")
    assert (tmp_path / "elsewhere" / "config.json").exists() and not (tmp_path / "link").exists()


def test_only_an_empty_checkpoints_folder_is_tidied(tmp_path: Path) -> None:
    tidy(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    tidy(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    kept = make_checkpoint(tmp_path, 1)
    tidy(tmp_path)
    assert kept.exists()


# What Python, torch 2.13 (whose archive writer loses the reason) and safetensors 0.8 raise on a full tmpfs.
FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/one/x"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "torch", "safetensors"])
def test_a_full_disk_is_one_line_with_the_path(error: Exception) -> None:
    with pytest.raises(BurnishError) as caught, disk_errors(Path("runs/one")):
        raise error
    message = str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in message
    assert message.startswith("runs/one") and "cannot be written (" in message


def test_what_is_no_fault_of_the_disk_passes_through() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), disk_errors(Path("x")):
        raise RuntimeError("out of memory")
    with pytest.raises(ConfigError, match=r"^c$"), disk_errors(Path("x")):
        raise ConfigError("c")
