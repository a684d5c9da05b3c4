"""What comes from the Hub: revision, cache and token. No network; test_hub_push.py has what goes to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish import FastSentenceTransformer
from burnish.core.errors import ModelError

Make = Callable[..., Any]
DOWNLOADERS = ("sentence_transformers.util.file_io.hf_hub_download", "transformers.utils.hub.hf_hub_download")


@pytest.mark.parametrize("name", ["cache_folder", "cache_dir"])
def test_cache_folder_and_revision(
    hub_cache: Path, tiny_bert_st: Path, load: Make, texts: list[str], name: str
) -> None:
    cache = {name: str(hub_cache)}
    main, branch, commit = (load("org/tiny", **cache, revision=at).encode(texts) for at in (None, "v2", "1" * 40))
    assert (main == load(tiny_bert_st).encode(texts)).all()
    assert (branch == commit).all() and abs(branch - main).max() > 1e-3
    with pytest.raises(ModelError, match=r"^model org/tiny: "):
        load("org/tiny", **cache, revision="v3")
    with pytest.raises(ModelError, match=r"^model org/tiny: "):
        load("org/tiny")


class Recorder:
    """Stands before a download function, notes what it was called with, and hands on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        for path in DOWNLOADERS:
            module, _, name = path.rpartition(".")
            monkeypatch.setattr(path, self.before(getattr(__import__(module, fromlist=[name]), name)))

    def before(self, download: Callable[..., Any]) -> Callable[..., Any]:
        def record(repo_id: str, filename: str, **keywords: Any) -> Any:
            self.calls.append({"repo_id": repo_id, "filename": filename, **keywords})
            return download(repo_id, filename, **keywords)

        return record

    def values(self, name: str) -> set[Any]:
        return {call.get(name) for call in self.calls}


def test_token_and_local_files_only_reach_every_download(
    hub_cache: Path, load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    load("org/tiny", cache_folder=str(hub_cache), token="hf_secret", local_files_only=True, revision="v2")
    names = {call["filename"] for call in recorder.calls}
    assert {"modules.json", "config.json", "config_sentence_transformers.json"} <= names
    assert recorder.values("token") == {"hf_secret"}
    assert recorder.values("local_files_only") == {True}
    # AutoModel looks for an adapter's config once more on its own, in the default cache and at the default revision.
    asked = [call for call in recorder.calls if call["filename"] != "adapter_config.json"]
    assert {call["cache_dir"] for call in asked} == {str(hub_cache)}
    assert {str(call["revision"]) for call in asked} <= {"v2", "1" * 40}


def test_no_token_means_the_one_that_login_left(hub_cache: Path, load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    load("org/tiny", cache_folder=str(hub_cache))
    assert recorder.calls and recorder.values("token") == {None}  # the Hub's client then looks it up by itself


def test_an_adapter_over_a_hub_model_finds_its_base(
    hub_cache: Path, load: Make, plain: Make, texts: list[str], tmp_path: Path
) -> None:
    model = FastSentenceTransformer.get_peft_model(load("org/tiny", cache_folder=str(hub_cache)), r=2)
    model.save_pretrained(str(tmp_path / "adapter"))
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "org/tiny"
    for again in (load, plain):
        found = again(tmp_path / "adapter", cache_folder=str(hub_cache)).encode(texts)
        assert abs(found - model.encode(texts)).max() <= 1e-5
