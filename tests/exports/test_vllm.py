"""vLLM 0.32 on a CPU: every folder served by the page's command, and its answers compared with the golden ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from burnish.core.endpoint_calls import Endpoint
from burnish.core.verifying import Verdict, verify_url

from . import vllm_server
from .long_models import save
from .vllm_server import Stopped, served

pytestmark = [pytest.mark.exports, pytest.mark.long, pytest.mark.timeout(900)]
Python = Callable[[str], Path]
Note = Callable[..., None]
EMPTY = "a pair whose second text is empty is scored as a single text, without the last separator"
REFUSED = {
    "distilbert": ("does not dispatch through the Transformers attention interface", "it has no DistilBERT"),
    "mpnet": ("Model architectures ['MPNetModel'] are not supported", "it has no MPNet"),
}


def golden(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    return found


def asked(folder: Path, url: str, cosine: float | None = None) -> Verdict:
    """What `burnish verify FOLDER --url URL --api vllm` finds."""
    return verify_url(folder, Endpoint(url=url, api="vllm", seconds=120), cosine=cosine)


def asked_as_the_page_says(url: str, word: str, place: Path) -> Any:
    (command,) = vllm_server.snippets("bash", word)
    command = command.replace("localhost:8000", url.removeprefix("http://"))
    done = subprocess.run(["sh", "-c", command], cwd=place, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["minilm", "gemma", "modernbert", "qwen3", "xlm_roberta"])
def test_embeddings(name: str, minilm: Path, python: Python, note: Note, tmp_path: Path) -> None:
    folder = save(name, minilm, tmp_path)
    reference = golden(folder)
    with served(python("vllm"), folder, tmp_path / "server") as url:
        verdict = asked(folder, url)
        longest = max(len(ids) for ids in reference["token_ids"])
        for text, ids in zip(reference["texts"], reference["token_ids"], strict=True):
            found = vllm_server.tokens(url, text)
            assert found == ids if len(ids) < longest else len(found) > longest, text
        if name == "minilm":
            the_page_s_snippets(url, reference, python, tmp_path / "server")
    note("vllm", name, verdict)
    assert verdict.good and verdict.rank == 1.0 and verdict.difference < 1e-5, verdict


def without(folder: Path, places: list[int], copy: Path) -> Path:
    """The same folder without some of its golden inputs."""
    reference = golden(folder)
    for key in ("inputs", "outputs", "token_ids"):
        reference[key] = [one for place, one in enumerate(reference[key]) if place not in places]
    return with_golden(folder, reference, copy)


def of_single_texts(folder: Path, copy: Path) -> Path:
    """The same classifier with golden texts in place of pairs, of which vLLM classifies none."""
    reference = golden(folder)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = sorted({text for pair in reference["inputs"] for text in pair if text})
    rows = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    with torch.no_grad():
        outputs = [model(**row).logits[0].tolist() for row in rows]
    ids = [row["input_ids"][0].tolist() for row in rows]
    made = {"inputs": texts, "outputs": outputs, "token_ids": ids}
    return with_golden(folder, {**reference, **made}, copy)


def with_golden(folder: Path, reference: dict[str, Any], copy: Path) -> Path:
    shutil.copytree(folder, copy)
    (copy / "golden.json").write_text(json.dumps(reference))
    described = json.loads((copy / "deploy.json").read_text())
    described["files"]["golden.json"] = hashlib.sha256((copy / "golden.json").read_bytes()).hexdigest()
    (copy / "deploy.json").write_text(json.dumps(described))
    return copy


def the_page_s_snippets(url: str, reference: dict[str, Any], python: Python, place: Path) -> None:
    text = "find this: Which planet is known as the Red Planet?"
    wanted = reference["outputs"][reference["texts"].index(text)]
    found = asked_as_the_page_says(url, "/v1/embeddings", place)["data"][0]["embedding"]
    assert np.allclose(found, wanted, atol=1e-5)
    (code,) = vllm_server.snippets("python", "OpenAI")
    code = code.replace("http://localhost:8000", url) + "\nprint(answer.data[0].embedding)\n"
    variables = vllm_server.environment(place)
    command = [str(python("vllm")), "-c", code]
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    length, vector = done.stdout.strip().splitlines()
    assert int(length) == len(wanted) and np.allclose(json.loads(vector), wanted, atol=1e-5)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        vllm_server.post(url, "/v1/embeddings", input="planet " * 300)


@pytest.mark.parametrize("name", ["minilm", "modernbert", "qwen3", "xlm_roberta"])
def test_rerankers(name: str, minilm: Path, python: Python, note: Note, tmp_path: Path) -> None:
    folder = save(name, minilm, tmp_path, kind="ranker")
    reference = golden(folder)
    empty = [place for place, pair in enumerate(reference["inputs"]) if not pair[1]]
    with served(python("vllm"), folder, tmp_path / "server") as url:
        everything = asked(folder, url)
        verdict = asked(without(folder, empty, tmp_path / "no empty ones"), url)
        for place in empty:
            first, second = reference["inputs"][place]
            used = vllm_server.post(url, "/rerank", query=first, documents=[second])["usage"]["prompt_tokens"]
            assert used < len(reference["token_ids"][place]), "then what is noted of empty texts has had its day"
        if name == "minilm":
            first, second = reference["inputs"][0]
            found = asked_as_the_page_says(url, "/rerank", tmp_path / "server")["results"][0]
            wanted = 1 / (1 + np.exp(-np.ravel(reference["outputs"][0])[0]))
            assert found["document"]["text"] == second and abs(found["relevance_score"] - wanted) < 1e-5
    assert len(empty) == 2 and verdict.inputs >= 14
    # The random heads of some weigh a separator less than what counts as wrong.
    assert everything.difference > 20 * verdict.difference
    assert name != "modernbert" or not everything.good, "an empty text is scored as none, and nobody is told"
    note("vllm", name, verdict, what=f"{name} ranker", reason=EMPTY)
    assert verdict.good and verdict.difference < 1e-4, verdict


def test_classes(minilm: Path, python: Python, note: Note, tmp_path: Path) -> None:
    folder = of_single_texts(save("minilm", minilm, tmp_path, kind="classes"), tmp_path / "single")
    with served(python("vllm"), folder, tmp_path / "server") as url:
        verdict = asked(folder, url)
        found = asked_as_the_page_says(url, "/classify", tmp_path / "server")["data"][0]["probs"]
    assert len(found) == 3 and abs(sum(found) - 1) < 1e-5
    note("vllm", "minilm", verdict, what="minilm classes")
    assert verdict.good and verdict.difference < 1e-4, verdict


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_it_does_not_read(name: str, minilm: Path, python: Python, note: Note, tmp_path: Path) -> None:
    words, reason = REFUSED[name]
    with pytest.raises(Stopped) as stopped, served(python("vllm"), save(name, minilm, tmp_path), tmp_path / "server"):
        pass
    assert words in str(stopped.value)
    note("vllm", name, "refused", reason=reason, version=vllm_server.VERSION)


def test_another_pooling_is_found_and_so_is_rounding(minilm: Path, python: Python, note: Note, tmp_path: Path) -> None:
    folder = save("minilm", minilm, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    pooling = json.loads((other / "1_Pooling" / "config.json").read_text())
    changed = {**pooling, "pooling_mode": "cls", "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (other / "1_Pooling" / "config.json").write_text(json.dumps(changed))
    with served(python("vllm"), other, tmp_path / "cls") as url:
        verdict = asked(other, url)
    assert verdict.cosine is not None and verdict.cosine < 0.99 and not verdict.good
    with served(python("vllm"), folder, tmp_path / "auto", [("--dtype float32 ", "")]) as url:
        verdict = asked(folder, url, 0.99)
    note("vllm", "minilm", verdict, what="minilm, --dtype auto", rounded=True)
    assert verdict.cosine is not None and verdict.cosine > 0.999 and verdict.difference > 1e-4
