"""What a live model writes and pushes by the exporters, and the pages on llama.cpp and Ollama: every snippet is run."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core import deploy
from burnish.core.endpoint_calls import Endpoint
from burnish.core.verifying import verify, verify_url

from ... import loopback_hub as server
from ...pages import blocks
from ..conftest import ROOT
from .conftest import Python, keys, read_by, run

pytestmark = [pytest.mark.exports, pytest.mark.long, pytest.mark.timeout(1800)]
Note = Callable[..., None]
PAGES = ROOT / "docs" / "serving"
PAGE = (PAGES / "llama-cpp.md").read_text(encoding="utf-8")


# From the live model, and to the Hub.

_LIVE = """
import json, sys
import burnish
model = getattr(burnish, sys.argv[3]).from_pretrained(sys.argv[1], for_inference=True, device="cpu")
for name, arguments, options in json.loads(sys.argv[2]):
    said = getattr(model, name)(*arguments, **options)
    print("said", said)
"""


def call(
    python: Path, source: Path, *calls: Sequence[Any], kind: str = "FastSentenceTransformer", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Methods of a live model, one after the other: (name, arguments, options)."""
    return run(python, _LIVE, source, json.dumps(calls), kind, env={**os.environ, **environment})


def test_saved_from_the_live_model(adapter: Path, served: Path, python: Python, tmp_path: Path) -> None:
    done = call(
        python("gguf"), adapter, ("save_pretrained_gguf", [str(tmp_path / "live")], {
            "quantization_method": ["fast_quantized", "quantized"], "libllama": str(python("node-llama-cpp")),
        }),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["precision"]: row for row in deploy.read(tmp_path / "live")["quality"]}
    assert list(rows) == ["q8_0", "q4_k_m"] and "merged" not in (tmp_path / "live" / "Modelfile").read_text()
    wanted = {row["precision"]: row["cosine_min"] for row in deploy.read(served)["quality"]}
    assert all(row["cosine_min"] == pytest.approx(wanted[name], abs=2e-3) for name, row in rows.items())
    assert read_by(python, "llama-cpp", tmp_path / "live").good


def test_a_reranker_saved_from_the_live_model(exported: Callable[[str], Path], python: Python, tmp_path: Path) -> None:
    source = exported("xlm_roberta ranker").with_name("model")
    method = ("save_pretrained_gguf", [str(tmp_path / "live")], {"quantization_method": "f16"})
    done = call(python("gguf"), source, method, kind="FastCrossEncoder")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = deploy.read(tmp_path / "live")["quality"]
    assert row["cosine_min"] is None and row["largest_difference"] < 1e-3
    assert read_by(python, "llama-cpp", tmp_path / "live").good


def test_onnx_from_the_live_model(adapter: Path, python: Python, tmp_path: Path) -> None:
    options = {"dtype": ["fp32", "int8"], "exporter": "torchscript"}
    done = call(python("exporter"), adapter, ("save_pretrained_onnx", [str(tmp_path / "live")], options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["precision"] for row in deploy.read(tmp_path / "live")["quality"]] == ["fp32", "int8"]
    assert verify(tmp_path / "live", python=python("onnxruntime")).good


def test_pushed_to_a_hub(adapter: Path, python: Python, tmp_path: Path) -> None:
    with server.running() as hub:
        place = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": server.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        method = {"quantization_method": "f16", "private": True}
        done = call(
            python("gguf"), adapter, ("push_to_hub_gguf", ["me/refunds-GGUF"], method),
            ("push_to_hub_gguf", ["me/refunds-GGUF"], {**method, "commit_message": "For review", "create_pr": True,
                                                       "quantization_method": "q8_0"}),
            ("push_to_hub_gguf", ["me/refunds-GGUF"], {**method, "revision": "v2"}),
            **place, BURNISH_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        repository = hub.repositories["me/refunds-GGUF"]
        files = repository.files()
        beside = {"Modelfile", "README.md", "deploy.json", "golden.json", "tokenizer.json"}
        assert repository.private and set(files) == {".gitattributes", "model-F16.gguf", *beside}
        assert b"me/refunds-GGUF" in files["README.md"] and b"model_id" not in files["README.md"]
        assert repository.messages[repository.refs["main"]][0] == "Add GGUF files: f16"
        first, second, third = re.findall(r"^said (\S+)$", done.stdout, re.M)
        assert first.endswith(repository.refs["main"]) and "/discussions/" in second
        assert third.endswith(repository.refs["v2"]) and "model-F16.gguf" in repository.files("v2")
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    verdict = read_by(python, "llama-cpp", tmp_path / "pulled")
    assert verdict.good, verdict


# The pages.


def snippets(kind: str) -> list[str]:
    return [block.text for block in blocks(PAGE) if block.kind == kind]


@pytest.fixture
def place(served: Path, exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that has what the page names."""
    (tmp_path / "served").symlink_to(served)
    (tmp_path / "reranker").symlink_to(exported("xlm_roberta ranker"))
    return tmp_path


QUERY, ANSWER = "find this: How long does a refund take?", "Within five working days."


def encoded(adapter: Path, texts: Sequence[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(adapter.with_name("merged")), device="cpu").encode(list(texts))


def wanted(adapter: Path) -> Any:
    return encoded(adapter, [QUERY, ANSWER])


def near(found: Any, right: Any) -> bool:
    return bool(np.abs(np.subtract(found, right)).max() < 1e-3)


def test_the_pages_python(place: Path, adapter: Path, python: Python) -> None:
    first, second = snippets("python")
    done = run(python("llama-cpp"), first + "\nimport json; print(json.dumps(vectors))", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(json.loads(done.stdout), wanted(adapter))
    done = run(python("llama-cpp"), second + "\nimport json; print(json.dumps(scores))", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(list(json.loads(done.stdout).values()), ranked(json.loads(done.stdout), place / "reranker"))


def ranked(scores: Mapping[str, float], folder: Path) -> list[float]:
    from sentence_transformers import CrossEncoder
    from torch import nn

    model = CrossEncoder(str(folder.resolve().with_name("model")), device="cpu")
    pairs = [("Which planet is red?", text) for text in scores]
    return [float(score) for score in model.predict(pairs, activation_fn=nn.Identity())]


def test_the_pages_javascript(place: Path, adapter: Path, python: Python) -> None:
    (script,) = snippets("js")
    (place / "node_modules").symlink_to(python("node-llama-cpp"))
    (place / "embed.mjs").write_text(f"{script}\nconsole.log(JSON.stringify(vectors));\nawait llama.dispose();\n")
    done = subprocess.run(["node", "embed.mjs"], cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(json.loads(done.stdout.strip().splitlines()[-1]), wanted(adapter))


@contextmanager
def llama_server(python: Python, place: Path, command: str) -> Iterator[str]:
    """The address of a server that a page's command starts."""
    (binary,) = python("llama-server").parents[1].glob("lib/python*/site-packages/*/bin/llama-server")
    binary.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = re.sub(r"--port \d+", "", command).split()
    assert words.pop(0) == "llama-server"
    started = subprocess.Popen(
        [str(binary), *words, "--port", str(port), "-t", "1"], cwd=place, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "LD_LIBRARY_PATH": str(binary.parent)},
    )  # fmt: skip
    try:
        for _ in range(240):
            with_error = None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError) as error:
                with_error = error
            time.sleep(0.25)
        assert with_error is None, with_error
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(30)


def post(address: str, **body: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_pages_server(place: Path, adapter: Path, python: Python) -> None:
    (command,) = re.findall(r"^\$ (llama-server .*)$", PAGE, re.M)
    with llama_server(python, place, command) as address:
        found = [row["embedding"] for row in post(f"{address}/v1/embeddings", input=[QUERY, ANSWER])["data"]]
        assert near(found, wanted(adapter))
        # What the page says of long texts, and of longer ones.
        (long,) = post(f"{address}/v1/embeddings", input="planet " * 250)["data"]
        assert near(long["embedding"], encoded(adapter, ["planet " * 250])[0])
        with pytest.raises(urllib.error.HTTPError):
            post(f"{address}/v1/embeddings", input="planet " * 300)
        verdict = verify_url(place / "served", Endpoint(url=address, api="openai"))
        assert verdict.good and verdict.inputs == 16, verdict  # of 19: one is too long, two become other tokens


def test_the_pages_ranking_server(place: Path, python: Python) -> None:
    (command,) = re.findall(r"`(llama-server [^`]* --reranking)`", PAGE)
    documents = ["Mars is called the Red Planet.", "Venus is called Earth's twin."]
    with llama_server(python, place, command) as address:
        rows = post(f"{address}/v1/rerank", query="Which planet is red?", documents=documents)["results"]
        verdict = verify_url(place / "reranker", Endpoint(url=address, api="cohere"))
        assert verdict.good and verdict.inputs == 14, verdict
    scores = {documents[row["index"]]: row["relevance_score"] for row in rows}
    assert near(list(scores.values()), ranked(scores, place / "reranker"))


def test_ollamas_modelfile(served: Path, exported: Callable[[str], Path], python: Python, note: Note) -> None:
    for folder, family in ((served, "minilm"), (exported("qwen3"), "qwen3"), (exported("modernbert"), "modernbert")):
        lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
        said = dict(line.split(maxsplit=1) for line in lines)
        assert set(said) == {"FROM", "PARAMETER"} and len(lines) == 2
        file, (name, value) = folder / said["FROM"], said["PARAMETER"].split()
        assert said["FROM"].startswith("./") and file.name == deploy.read(folder)["runtime_file"]
        found = keys(python, file)
        architecture = found["general.architecture"]
        assert name == "num_ctx" and int(value) == deploy.read(folder)["max_seq_length"]
        assert int(value) <= found[f"{architecture}.context_length"]
        assert found[f"{architecture}.pooling_type"] in (1, 2, 3)
        note("ollama", family, "static", version="a Modelfile over the verified GGUF", what=f"{family} f16")
    page = (PAGES / "ollama.md").read_text(encoding="utf-8")
    (shown,) = [block.text for block in blocks(page) if block.kind == "text"]
    assert shown == (served / "Modelfile").read_text(encoding="utf-8").strip()
