"""Pushes against a Hub on this machine: what arrives, what is sent twice, and what every fault leaves behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from burnish import FastCrossEncoder, FastSentenceTransformer
from burnish.core.errors import BurnishError, ConfigError, ModelError
from burnish.core.hub import command, push_folder, unfinished, upload
from burnish.core.hub_errors import HubError
from burnish.core.hub_upload import Push

Make = Callable[..., Any]


def load_server() -> Any:
    """`tests/loopback_hub.py`, which no import reaches."""
    place = Path(__file__).parents[1] / "loopback_hub.py"
    spec = importlib.util.spec_from_file_location("loopback_hub", place)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What httpx2 says of how huggingface_hub 2.4 sends the parts of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
server = load_server()
Fault = server.Fault


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited; none of them is."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> Iterator[Any]:
    """A Hub on this machine, and the token that a login has left."""
    login = tmp_path / "home" / "token"
    login.parent.mkdir()
    login.write_text(server.TOKEN)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    with server.running() as hub:
        for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                            "HF_TOKEN_PATH": str(login)}.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        yield hub


def write_folder(folder: Path, weights: bytes = b"w" * 150_000, **more: str) -> None:
    """Something with the shape of a saved model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "README.md").write_text('---\ntags:\n- a\n---\nSentenceTransformer("sentence_transformers_model_id")\n')
    (folder / "model.safetensors").write_bytes(weights)
    for name, text in more.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "model")
    return tmp_path / "model"


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def left_over() -> list[Path]:
    """Folders that pushes have left."""
    return sorted(unfinished().glob("*/*")) if unfinished().exists() else []


# What arrives.


@pytest.mark.parametrize("token", [None, server.TOKEN])
def test_an_adapter_arrives(
    hub: Any, adapted: Make, plain: Make, texts: list[str], tmp_path: Path, token: str | None
) -> None:
    model = adapted()
    if token is not None:
        Path(constants.HF_TOKEN_PATH).unlink()
    url = model.push_to_hub("me/adapter", token=token, private=True)
    repository = hub.repositories["me/adapter"]
    assert url == f"{hub.endpoint}/me/adapter/commit/{repository.refs['main']}"
    assert set(hub.tokens) == {server.TOKEN} and repository.private
    files = repository.files()
    assert "adapter_model.safetensors" in files and not {"model.safetensors", "config.json"} & set(files)
    assert b"me/adapter" in files["README.md"] and b"model_id" not in files["README.md"]
    assert abs(plain(unpack(files, tmp_path / "pulled")).encode(texts) - model.encode(texts)).max() <= 1e-5
    assert not left_over()


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_merged_model_arrives_on_a_branch(
    hub: Any, adapted: Make, plain: Make, texts: list[str], tmp_path: Path, with_tokenizer: bool
) -> None:
    model = adapted()
    model.save_pretrained_merged(tmp_path / "saved")
    tokenizer = model.tokenizer if with_tokenizer else None
    model.push_to_hub_merged("me/merged", tokenizer=tokenizer, commit_message="Merged", revision="v1", private=False)
    repository = hub.repositories["me/merged"]
    assert set(repository.files()) == {".gitattributes"}, "main was touched"
    assert repository.messages[repository.refs["v1"]][0] == "Merged" and not repository.private
    files = repository.files("v1")
    assert set(files) == names_of(tmp_path / "saved") | {".gitattributes"}
    assert abs(plain(unpack(files, tmp_path / "pulled")).encode(texts) - model.encode(texts)).max() <= 1e-5
    assert model.active_adapters() == ["default"]


def test_the_other_parameters(hub: Any, adapted: Make) -> None:
    model = adapted()
    url = model.push_to_hub_merged("me/merged", create_pr=True, save_method="merged_16bit")
    repository = hub.repositories["me/merged"]
    assert url == f"{hub.endpoint}/me/merged/discussions/1"
    assert set(repository.files()) == {".gitattributes"}
    assert json.loads(repository.files("refs/pr/1")["config.json"])["dtype"] == "float16"
    title, text = repository.pull_requests[0]
    assert title == "Add new SentenceTransformer model" and "Pooling" in text
    model.push_to_hub_merged("me/lora", save_method="lora", exist_ok=False)
    assert "adapter_config.json" in hub.repositories["me/lora"].files()
    count = len(hub.log)
    with pytest.raises(ConfigError, match=r"^save_method: 'gguf' is unknown\. Pass None or one of merged_16bit"):
        model.push_to_hub_merged("me/merged", save_method="gguf")
    with pytest.raises(ConfigError, match=r"^layout: 'new' is unknown"):
        model.push_to_hub("me/merged", exist_ok=True, layout="new")
    with pytest.raises(ConfigError, match="only safetensors"):
        model.push_to_hub("me/merged", exist_ok=True, safe_serialization=False)
    assert len(hub.log) == count, "something was asked of the Hub before the parameters were checked"
    assert not left_over()


def test_a_full_model_and_a_folder_that_is_there(hub: Any, load: Make, tiny_bert_st: Path, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    model.push_to_hub("full")
    assert "model.safetensors" in hub.repositories["me/full"].files()
    write_folder(tmp_path / "there", weights=b"other")
    model.push_to_hub("org/there", local_model_path=str(tmp_path / "there"))
    assert hub.repositories["org/there"].files()["model.safetensors"] == b"other"
    assert (tmp_path / "there" / "config.json").exists()


def test_a_reranker_arrives(hub: Any, tiny_bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = FastCrossEncoder.from_pretrained(str(tiny_bert), num_labels=1, device="cpu")
    model = FastCrossEncoder.get_peft_model(model, r=2)
    pairs = [("a question", "its answer"), ("another", "")]
    for name, push in (("adapter", model.push_to_hub), ("merged", model.push_to_hub_merged)):
        push(f"me/{name}")
        files = hub.repositories[f"me/{name}"].files()
        assert f"me/{name}".encode() in files["README.md"]
        folder = str(unpack(files, tmp_path / name))
        read = (
            FastCrossEncoder.from_pretrained(folder, device="cpu").eval() if name == "adapter" else CrossEncoder(folder)
        )
        assert abs(read.predict(pairs) - model.predict(pairs)).max() <= 1e-5


def test_a_classifier_arrives(hub: Any, tiny_bert: Path, tmp_path: Path) -> None:
    from burnish import FastClassifier

    model = FastClassifier.from_pretrained(str(tiny_bert), labels=["no", "yes"], device="cpu", full_finetuning=True)
    model.push_to_hub("me/classes")
    again = FastClassifier.from_pretrained(
        str(unpack(hub.repositories["me/classes"].files(), tmp_path / "c")), device="cpu"
    )
    assert again.labels == ("no", "yes")


# What is sent again.


def test_only_what_is_missing_is_sent(hub: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push = Push(repo_id="me/x", replace_card=True)
    first = upload(folder, push)
    assert len(hub.calls("^PUT")) == 3, "150 kB are three parts"
    hub.log.clear()
    assert upload(folder, push) == first
    assert not hub.calls("PUT|commit|preupload") and "me/x holds all of it already" in capsys.readouterr().err
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    second = upload(folder, push)
    assert second != first and not hub.calls("PUT")
    assert json.loads(hub.repositories["me/x"].files()["config.json"]) == {"model_type": "xlm-roberta"}
    assert "1 of 4 files to upload to me/x" in capsys.readouterr().err
    upload(folder, Push(repo_id="me/x", replace_card=True, create_pr=True))
    assert not hub.repositories["me/x"].pull_requests, "a pull request of nothing"


def test_files_that_went_through_are_not_sent_again(hub: Any, folder: Path) -> None:
    (folder / "second.safetensors").write_bytes(b"2" * 1000)
    hub.faults = [Fault("PUT /store/[0-9a-f]{64}$", 400, message="no")]  # the small one; the other goes in parts
    with pytest.raises(HubError, match="no"):
        upload(folder, Push(repo_id="me/x"))
    sent = set(hub.large)
    hub.log.clear()
    upload(folder, Push(repo_id="me/x"))
    again = {line.split("/")[2] for line in hub.calls("PUT /store")}
    assert again.isdisjoint(sent) and hub.repositories["me/x"].files()["second.safetensors"] == b"2" * 1000


def test_an_earlier_model_leaves_in_the_same_commit(
    hub: Any, adapted: Make, plain: Make, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    model.push_to_hub("me/x")
    repository = hub.repositories["me/x"]
    repository.commits[repository.refs["main"]]["notes.txt"] = server.File(b"mine")
    count = len(repository.commits)
    model.push_to_hub_merged("me/x")
    files = repository.files()
    assert "adapter_config.json" not in files and files["notes.txt"] == b"mine"
    assert len(repository.commits) == count + 1
    assert "in the same commit, being an earlier model's: adapter_config.json" in capsys.readouterr().err
    assert abs(plain(unpack(files, tmp_path / "pulled")).encode(texts) - model.encode(texts)).max() <= 1e-5
    # A folder that is no model, as an export may be, takes the place of nothing.
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"gguf")
    upload(tmp_path / "gguf", Push(repo_id="me/x"))
    assert set(repository.files()) == {*files, "model.gguf"}


def test_an_adapter_does_not_go_over_its_base(
    hub: Any, hub_cache: Path, load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = FastSentenceTransformer.get_peft_model(load("org/tiny", cache_folder=str(hub_cache), local_files_only=True))
    hub.log.clear()
    with pytest.raises(ConfigError, match=r"^Org/tiny: the adapter needs the base model in this repository\. Push to"):
        model.push_to_hub("Org/tiny", exist_ok=True)
    assert not hub.log


def test_the_card_that_is_there_stays(hub: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload(folder, Push(repo_id="me/x"))
    assert hub.repositories["me/x"].files()["README.md"].endswith(b'SentenceTransformer("me/x")\n')
    assert b"sentence_transformers_model_id" in (folder / "README.md").read_bytes()
    (folder / "README.md").write_text("---\ntags: [b]\n---\nnew\n")
    upload(folder, Push(repo_id="me/x"))
    assert "README.md of me/x stays as it is; replace_model_card=True" in capsys.readouterr().err
    assert b"new" not in hub.repositories["me/x"].files()["README.md"]
    upload(folder, Push(repo_id="me/x", replace_card=True))
    assert hub.repositories["me/x"].files()["README.md"].endswith(b"new\n")


# What is refused.


def test_refused_before_anything_is_asked_or_written(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> None:
        raise AssertionError("the model was saved first")

    with pytest.raises(ConfigError, match=r"^repo_id: 'a/b/c' names no repository\. Write OWNER/NAME"):
        push_folder(make, "a/b/c")
    with pytest.raises(ConfigError, match=r"^create_pr, revision: a pull request goes to main, not to 'v1'"):
        push_folder(make, "me/x", create_pr=True, revision="v1")
    Path(constants.HF_TOKEN_PATH).unlink()
    with pytest.raises(ConfigError, match=r"^push to me/x: there is no token for the Hub\. Run `hf auth login`"):
        push_folder(make, "me/x")
    assert not hub.log and not left_over()
    with pytest.raises(HubError, match=r"^push to x: the Hub does not accept the token \(401.*hf auth login"):
        push_folder(make, "x", token="hf_old")


def test_what_is_there_and_is_not_as_asked(hub: Any, folder: Path) -> None:
    upload(folder, Push(repo_id="me/x"))
    with pytest.raises(ConfigError, match=r"^me/x: the repository is there already\. Pass exist_ok=True"):
        upload(folder, Push(repo_id="me/x", exist_ok=False))
    with pytest.raises(ConfigError, match=r"^me/x, private=True: the repository is public already") as error:
        push_folder(write_folder, "me/x", private=True)
    assert len(left_over()) == 1 and str(left_over()[0]) in str(error.value)
    upload(folder, Push(repo_id="me/x", private=False))


def test_a_folder_that_is_no_model(hub: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no files"):
        upload(tmp_path / "empty", Push(repo_id="me/x"))
    with pytest.raises(ModelError, match="is not a folder"):
        upload(tmp_path / "none", Push(repo_id="me/x"))
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ModelError, match=r"README\.md: its head is not metadata that the Hub reads") as error:
        upload(folder, Push(repo_id="me/x"))
    assert "\n" not in str(error.value) and not hub.log
    # What only the Hub finds wrong is said before a large file is sent.
    (folder / "README.md").write_text("---\ntags: [a]\nbad: []\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata in README\.md"):
        upload(folder, Push(repo_id="me/x"))
    assert not hub.calls("PUT")


# What goes wrong on the way.

STAGES = {
    "create": "POST /api/repos/create",
    "branch": "POST /api/models/me/x/branch",
    "listing": "GET /api/models/me/x/tree",
    "preupload": "POST /api/models/me/x/preupload",
    "batch": "POST /me/x.git/info/lfs/objects/batch",
    "part": "PUT /store/[0-9a-f]+/2",
    "complete": "POST /store/[0-9a-f]+/complete",
    "commit": "POST /api/models/me/x/commit",
}
ENDLESS = 10**6
WORDS = {
    401: r"the Hub does not accept the token \(401.*hf auth login",
    403: r"the token may not do this \(403.*may write",
    404: r"the Hub knows no such repository",
    409: r"the Hub refuses \(409.*try again",
    413: r"the Hub refuses \(413.*no files of this size",
    429: r"the Hub takes no more requests for now \(429",
    500: r"the Hub has a fault \(500.*Try again later",
    None: r"the connection was lost \(.*Check the network",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("status", WORDS)
def test_every_fault_is_one_line_and_can_be_repeated(
    hub: Any, cli: Make, stage: str, status: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if (stage, status) in (("create", 409), ("branch", 409)):
        pytest.skip("there is how the Hub says that it exists")  # tested above
    hub.faults = [Fault(STAGES[stage], status, times=ENDLESS)]
    with pytest.raises(HubError, match=rf"^push to me/x: {WORDS[status]}") as error:
        push_folder(write_folder, "me/x", revision="v1")
    text = str(error.value)
    assert "\n" not in text and server.TOKEN not in text and ".. " not in text
    hits = hub.calls(STAGES[stage])
    bound = 4 if status in (429, 500, None) else 1
    # huggingface_hub itself asks five times more where it is said that a request may be repeated.
    assert 1 <= len(hits) <= bound * 6
    repository = hub.repositories.get("me/x")
    assert repository is None or len(repository.commits) == 1, "something was committed"
    # The folder is whole, and the command in the message is all it takes.
    (left,) = left_over()
    assert str(left) in text and len(names_of(left)) == 4
    asked = text.rpartition("To go on: ")[2]
    hub.faults = []
    capsys.readouterr()
    code, out, _ = cli(*shlex.split(asked)[1:])
    assert code == 0 and out.strip() == f"{hub.endpoint}/me/x/commit/{hub.repositories['me/x'].refs['v1']}"
    files = hub.repositories["me/x"].files("v1")
    assert set(files) == {".gitattributes", "1_Pooling/config.json", "README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == b"w" * 150_000
    assert not left_over(), "a folder that has arrived was left"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("status", [500, None])
def test_a_passing_fault_is_told_and_passed(
    hub: Any,
    folder: Path,
    stage: str,
    late: bool,
    status: int | None,
    waits: list[float],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.faults = [Fault(STAGES[stage], status, late=late)]
    upload(folder, Push(repo_id="me/x", revision="v1"))
    repository = hub.repositories["me/x"]
    assert len(repository.commits) == 2, "committed not at all, or twice"
    assert repository.files("v1")["model.safetensors"] == b"w" * 150_000
    assert waits, "nothing went wrong"
    assert "attempt 2 of 4 in 1 s" in capsys.readouterr().err or "Retrying in 1" in caplog.text


def test_what_the_hub_asks_to_wait_is_waited(hub: Any, folder: Path, waits: list[float]) -> None:
    commit = STAGES["commit"]
    hub.faults = [
        Fault(commit, 429, headers={"Retry-After": "7"}),
        Fault(commit, 429, headers={"RateLimit": '"api";r=0;t=55'}),
        Fault(commit, 503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}),
    ]
    upload(folder, Push(repo_id="me/x"))
    assert waits[:2] == [7, 55] and 25 <= waits[2] <= 30 and len(waits) == 3


def test_nobody_is_kept_for_an_hour(hub: Any, folder: Path, waits: list[float]) -> None:
    hub.faults = [Fault(STAGES["commit"], 429, headers={"Retry-After": "3600"})]
    with pytest.raises(HubError, match=r"\(429.*Wait 3600 s\. The folder is whole"):
        upload(folder, Push(repo_id="me/x"))
    assert waits == []


def test_one_pull_request_whatever_happens(hub: Any, folder: Path) -> None:
    hub.faults = [Fault(STAGES["commit"], None, times=4)]
    with pytest.raises(HubError, match=r"To go on: burnish push \S+ me/x --revision refs/pr/1$"):
        upload(folder, Push(repo_id="me/x", create_pr=True))
    upload(folder, Push(repo_id="me/x", revision="refs/pr/1"))
    repository = hub.repositories["me/x"]
    assert len(repository.pull_requests) == 1 and "model.safetensors" in repository.files("refs/pr/1")
    # An upload that does not come to its end opens none.
    hub.faults = [Fault("POST /api/models/me/y/preupload", 403)]
    with pytest.raises(HubError, match=r"me/y --pull-request$"):
        upload(folder, Push(repo_id="me/y", create_pr=True))
    assert not hub.repositories["me/y"].pull_requests


def test_a_repository_that_this_push_made_is_there_for_the_next(hub: Any, cli: Make) -> None:
    hub.faults = [Fault(STAGES["commit"], 403)]
    with pytest.raises(HubError) as error:
        push_folder(write_folder, "me/x", exist_ok=False)
    asked = str(error.value).rpartition("To go on: ")[2]
    assert "--new" not in asked and cli(*shlex.split(asked)[1:])[0] == 0
    hub.faults = [Fault(STAGES["create"], 403)]
    with pytest.raises(HubError, match=r"me/y --new$"):
        push_folder(write_folder, "me/y", exist_ok=False)


def test_creation_is_not_asked_for_ever(hub: Any, folder: Path, waits: list[float]) -> None:
    hub.conflicts = 3
    upload(folder, Push(repo_id="me/x"))
    assert waits == [1, 2]
    hub.conflicts = 1000
    with pytest.raises(HubError, match=r"busy with creating another repository of this account \(409\)"):
        upload(folder, Push(repo_id="me/y"))
    assert len(hub.calls("POST /api/repos/create")) <= 4 + 6


def test_offline_is_said(hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"offline mode is enabled.* Unset HF_HUB_OFFLINE"):
        upload(folder, Push(repo_id="me/x"))


# What is left behind.


def test_a_full_disk_leaves_nothing(hub: Any, adapted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("burnish.core.golden.write_golden", full)
        with pytest.raises(BurnishError, match=r"no space is left on the disk\. Free some"):
            model.push_to_hub("me/x")
    assert not left_over() and not list(unfinished().iterdir()) and not hub.repositories
    Path(os.environ["BURNISH_CACHE"], "push").rmdir()
    Path(os.environ["BURNISH_CACHE"], "push").write_text("a file")
    with pytest.raises(BurnishError, match=r"push: cannot be written \(.*\)\. Set BURNISH_CACHE"):
        model.push_to_hub("me/x")


def test_an_interrupt_says_how_to_go_on(
    hub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push_folder(write_folder, "me/x")
    (left,) = left_over()
    assert f"The folder is whole: {left}. To go on: burnish push {left} me/x" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    with pytest.raises(KeyError) as error:
        push_folder(write_folder, "me/x")
    assert str(left_over()[0]) in error.value.__notes__[0]


def test_the_command_says_all_but_the_token(folder: Path) -> None:
    push = Push(repo_id="me/x", token="hf_secret", private=True, commit_message="it's new", revision="v1",
                exist_ok=False, replace_card=True)  # fmt: skip
    words = shlex.split(command(folder, push))
    assert words == ["burnish", "push", str(folder), "me/x", "--revision", "v1", "--message", "it's new", "--private",
                     "--new", "--replace-card"]  # fmt: skip


# The client as it is installed: through `HF_ENDPOINT`, with chunks of large files where hf_xet is there.

JOURNEY = """
    import sys
    from pathlib import Path
    from burnish import FastSentenceTransformer

    model = FastSentenceTransformer.from_pretrained(sys.argv[1], device="cpu", full_finetuning=True)
    model.save_pretrained("saved")
    for _ in range(2):
        print(model.push_to_hub("me/journey", local_model_path="saved", exist_ok=True, replace_model_card=True))
    if sys.argv[2] == "load":
        from sentence_transformers import SentenceTransformer

        pulled = SentenceTransformer("me/journey", device="cpu")
        assert abs(pulled.encode(["a text"]) - model.encode(["a text"])).max() < 1e-5
        print("loaded")
"""


@pytest.mark.parametrize("xet", [False, True])
def test_through_the_variables_that_users_set(tmp_path: Path, tiny_bert_st: Path, xet: bool) -> None:
    with server.running() as hub:
        own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": server.TOKEN, "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
        script = [sys.executable, "-c", textwrap.dedent(JOURNEY), str(tiny_bert_st), "push" if xet else "load"]
        done = subprocess.run(script, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"{hub.endpoint}/me/journey/commit/" in done.stdout and "holds all of it already" in done.stderr
        assert ("loaded" in done.stdout) is not xet
        if xet and hub.calls("xet-write-token"):  # huggingface_hub 1 asks the server, which has the older way too
            assert hub.xorbs and hub.shards and not hub.large
        else:
            assert hub.large
