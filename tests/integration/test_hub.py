"""What goes to the Hub and comes from it: revision, cache, token, and the folder that is pushed. No network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from burnish import FastSentenceTransformer
from burnish.core.errors import ConfigError, ModelError

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


class FakeApi:
    """The calls that a push makes, and the files it uploads."""

    log: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - one for all instances, emptied by the fixture
    files: dict[str, bytes] = {}  # noqa: RUF012

    def __init__(self, token: Any = "unset", **_: Any) -> None:
        self.log.append(("token", {"token": token}))

    def create_repo(self, **keywords: Any) -> Any:
        self.log.append(("create_repo", keywords))
        return SimpleNamespace(repo_id=keywords["repo_id"])

    def create_branch(self, **keywords: Any) -> None:
        self.log.append(("create_branch", keywords))

    def upload_folder(self, folder_path: str, **keywords: Any) -> Any:
        self.log.append(("upload_folder", keywords))
        root = Path(folder_path)
        self.files.update({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()})
        return SimpleNamespace(commit_url="https://hub.test/commit/1", pr_url="https://hub.test/pull/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.log.clear()
    FakeApi.files.clear()
    monkeypatch.setattr("sentence_transformers.base.model.HfApi", FakeApi)
    monkeypatch.setattr("sentence_transformers.base.model.load_file_path", lambda *_, **__: None)
    return FakeApi


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_push_to_hub_uploads_the_adapter(
    hub: type[FakeApi], adapted: Make, plain: Make, texts: list[str], tmp_path: Path, token: str | None
) -> None:
    model = adapted()
    assert model.push_to_hub("me/adapter", token=token, private=True) == "https://hub.test/commit/1"
    assert hub.log[0] == ("token", {"token": token})
    assert dict(hub.log)["create_repo"]["private"] is True
    assert "adapter_model.safetensors" in hub.files and "model.safetensors" not in hub.files
    assert "config.json" not in hub.files  # beside an adapter it would make the folder load as a full model
    assert abs(plain(unpack(hub.files, tmp_path / "pulled")).encode(texts) - model.encode(texts)).max() <= 1e-5


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_push_to_hub_merged_uploads_the_merged_model(
    hub: type[FakeApi],
    adapted: Make,
    plain: Make,
    texts: list[str],
    tmp_path: Path,
    token: str | None,
    with_tokenizer: bool,
) -> None:
    model = adapted()
    model.save_pretrained_merged(tmp_path / "saved")
    url = model.push_to_hub_merged(
        "me/merged",
        tokenizer=model.tokenizer if with_tokenizer else None,
        token=token,
        commit_message="Merged",
        revision="v1",
        private=False,
    )
    assert url == "https://hub.test/commit/1"
    assert hub.log[0] == ("token", {"token": token})
    calls = dict(hub.log)
    assert calls["create_repo"] == {"repo_id": "me/merged", "private": False, "repo_type": None, "exist_ok": True}
    assert calls["create_branch"]["branch"] == calls["upload_folder"]["revision"] == "v1"
    assert calls["upload_folder"]["commit_message"] == "Merged"
    saved = {str(p.relative_to(tmp_path / "saved")) for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert set(hub.files) == saved and not any("adapter" in name for name in saved)
    assert abs(plain(unpack(hub.files, tmp_path / "pulled")).encode(texts) - model.encode(texts)).max() <= 1e-5
    assert model.active_adapters() == ["default"]


def test_push_to_hub_merged_honours_its_other_parameters(hub: type[FakeApi], adapted: Make) -> None:
    model = adapted()
    assert (
        model.push_to_hub_merged("me/merged", create_pr=True, save_method="merged_16bit") == "https://hub.test/pull/1"
    )
    assert json.loads(hub.files["config.json"])["dtype"] == "float16"
    assert model.push_to_hub_merged("me/lora", save_method="lora", exist_ok=False) == "https://hub.test/commit/1"
    assert hub.log[-1][0] == "upload_folder" and hub.log[-2][1]["exist_ok"] is False
    assert "adapter_config.json" in hub.files
    count = len(hub.log)
    with pytest.raises(ConfigError, match=r"^save_method: 'gguf' is unknown\. Pass None or one of merged_16bit"):
        model.push_to_hub_merged("me/merged", save_method="gguf")
    assert len(hub.log) == count, "something was pushed before the parameters were checked"


def test_without_an_adapter_the_full_model_is_pushed(hub: type[FakeApi], load: Make, tiny_bert_st: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    model.push_to_hub("me/full")
    assert "model.safetensors" in hub.files and "adapter_config.json" not in hub.files


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
