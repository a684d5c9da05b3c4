"""`burnish verify --url` with a server that others wrote: llama.cpp's, by OpenAI's and Cohere's APIs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.core.endpoint_calls import Endpoint
from burnish.core.errors import ModelError
from burnish.core.verifying import verify_url

from .conftest import Python
from .test_handed_on import llama_server

pytestmark = [pytest.mark.exports, pytest.mark.long, pytest.mark.timeout(1800)]


def test_embeddings(served: Path, python: Python) -> None:
    command = f"llama-server -m {served}/model-F16.gguf --embeddings -c 256 -b 256 -ub 256"
    with llama_server(python, served, command) as address:
        verdict = verify_url(served, Endpoint(url=f"{address}/v1", api="openai"))
        assert verdict.good and verdict.cosine is not None and verdict.cosine > 0.9999, verdict
        # What its tokenizer cuts otherwise, and what it finds too long.
        assert verdict.inputs == 16 and len(verdict.notes) == 2, verdict.notes
        assert "input (330 tokens) is too large to process" in verdict.notes[1]
        with pytest.raises(ModelError, match=r"/api/embed: knows no such path or model \(404\): File Not Found\. Pass"):
            verify_url(served, Endpoint(url=address, api="ollama"))
    with llama_server(python, served, f"{command} --pooling cls") as address:
        verdict = verify_url(served, Endpoint(url=address, api="openai"))
        assert not verdict.good and verdict.cosine is not None and verdict.cosine < 0.95, verdict


def test_scores(exported: Callable[[str], Path], python: Python) -> None:
    folder = exported("xlm_roberta ranker")
    command = f"llama-server -m {folder}/model-F16.gguf --reranking -c 64 -b 64 -ub 64"
    with llama_server(python, folder, command) as address:
        verdict = verify_url(folder, Endpoint(url=address, api="cohere"))
    assert verdict.good and verdict.difference < 0.01 and verdict.rank > 0.95, verdict
