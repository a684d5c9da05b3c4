"""Servers on this machine that serve a real model as OpenAI's, TEI's, Ollama's, Cohere's and vLLM's APIs have it.

Every one of them can be made to go wrong. Nothing of theirs is shared with real servers but the shapes of requests and
answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

Rows = list[list[float]]
Change = Callable[[list[Any]], list[Any]]


@dataclass
class Served:
    """A model and how its server goes wrong.

    Args:
        embed: Texts to vectors.
        score: Pairs, or texts, to logits.
        labels: Of a classifier.
        prompts: By name, for requests that ask for one.
        name: What the server calls the model.
        token: What it wants to be given.
        status: An error's status, and what it says with it.
        delay: Seconds before it answers.
        raw: Bytes in place of every answer.
        drip: Seconds between one of those bytes and the next.
        short: How many bytes more than it sends it says there are.
        heard: What happens to texts before they are computed.
        given: What happens to the list of results before it is sent.
        refuse: Which texts it refuses, with the status `refusal`.
        activated: What it makes of logits where it is not told to leave them.
    """

    embed: Callable[[list[str]], Any] | None = None
    score: Callable[[list[Any]], Any] | None = None
    labels: Sequence[str] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    name: str = "tiny"
    token: str | None = None
    status: tuple[int, Any] | None = None
    delay: float = 0.0
    raw: bytes | None = None
    drip: float = 0.0
    short: int = 0
    heard: Callable[[str], str] = str
    given: Change = list
    refuse: Callable[[str], bool] = lambda text: False
    refusal: int = 422
    activated: Callable[[Any], Any] = np.asarray
    url: str = ""
    asked: list[tuple[str, Any, str | None]] = field(default_factory=list)

    def answer(self, path: str, body: Any) -> Any:
        """What is sent for a request; a number stands for an error's status."""
        if body is None:
            return {
                "/v1/models": {"object": "list", "data": [{"id": self.name}]},
                "/info": {"version": "1.9.0", "model_id": self.name},
                "/api/version": {"version": "0.12.0"},
                "/version": {"version": "0.32.0"},
            }.get(path, 404)
        if "model" in body and body["model"] != self.name:
            return 404
        texts = [body[key] for key in ("query", "text_1", "text_2", "input", "inputs", "texts") if key in body]
        if any(self.refuse(text) for text in _flat(texts)):
            return self.refusal
        return getattr(self, path.strip("/").replace("/", "_"))(body)

    def _vectors(self, texts: list[str], normalize: bool = False) -> Rows:
        assert self.embed is not None
        rows = np.asarray(self.embed([self.heard(text) for text in texts]), dtype=np.float64)
        found: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows).tolist()
        return found

    def _logits(self, inputs: list[Any], raw: bool) -> Any:
        assert self.score is not None
        found = np.asarray(self.score(inputs), dtype=np.float64).reshape(len(inputs), -1)
        return found if raw else self.activated(found)

    def v1_embeddings(self, body: Any) -> Any:
        rows = self._vectors(body["input"])
        items = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]
        return {"object": "list", "model": body["model"], "data": self.given(items)}

    def embed_(self, body: Any) -> Any:
        prompt = self.prompts[body["prompt_name"]] if "prompt_name" in body else ""
        return self.given(self._vectors([prompt + text for text in body["inputs"]], body.get("normalize", True)))

    def api_embed(self, body: Any) -> Any:
        return {"model": body["model"], "embeddings": self.given(self._vectors(body["input"], normalize=True))}

    def _ranked(self, query: str, texts: list[str], raw: bool, key: str) -> list[Any]:
        scores = self._logits([(query, text) for text in texts], raw)[:, 0]
        found = [{"index": place, key: score} for place, score in enumerate(scores)]
        return self.given(sorted(found, key=lambda one: -one[key]))

    def rerank(self, body: Any) -> Any:
        return self._ranked(body["query"], body["texts"], body["raw_scores"], "score")

    def v1_rerank(self, body: Any) -> Any:
        return {"results": self._ranked(body["query"], body["documents"], False, "relevance_score")}

    def score_(self, body: Any) -> Any:
        pairs = list(zip(body["text_1"], body["text_2"], strict=True))
        scores = self._logits(pairs, not body["use_activation"])[:, 0]
        return {"data": self.given([{"index": place, "score": score} for place, score in enumerate(scores)])}

    def predict(self, body: Any) -> Any:
        inputs = [one[0] if len(one) == 1 else tuple(one) for one in body["inputs"]]
        rows = self._logits(inputs, body["raw_scores"])
        items = [[{"label": name, "score": one} for name, one in zip(self.labels, row, strict=True)] for row in rows]
        return self.given([sorted(one, key=lambda item: -item["score"]) for one in items])

    def classify(self, body: Any) -> Any:
        rows = self._logits(body["input"], not body["use_activation"])
        items = [{"index": place, "label": "?", "probs": row.tolist()} for place, row in enumerate(rows)]
        return {"data": self.given(items)}


def _flat(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    else:
        for one in given:
            yield from _flat(one)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._do(None)

    def do_POST(self) -> None:
        self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _do(self, body: Any) -> None:
        served, token = self.server.served, self.headers.get("Authorization")
        served.asked.append((self.path, body, token))
        time.sleep(served.delay)
        if served.token is not None and token != f"Bearer {served.token}":
            return self._send(401, {"error": {"message": "no such key", "code": 401}})
        if served.status is not None:
            return self._send(*served.status)
        if served.raw is not None:
            return self._bytes(200, served.raw)
        path = f"{self.path}_" if self.path in ("/embed", "/score") else self.path
        found = served.answer(path, body)
        if isinstance(found, int):
            return self._send(found, {"error": "`inputs` cannot be served", "error_type": "Validation"})
        return self._send(200, found)

    def _send(self, status: int, said: Any) -> None:
        self._bytes(status, said if isinstance(said, bytes) else json.dumps(said).encode())

    def _bytes(self, status: int, said: bytes) -> None:
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(said) + self.server.served.short))
        self.end_headers()
        drip = self.server.served.drip
        for part in [said[place : place + 1] for place in range(len(said))] if drip else [said]:
            self.wfile.write(part)
            time.sleep(drip)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for those that still answer
    served: Served

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is what some tests are about."""


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """The model behind a port of this machine, for the length of a block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.served = served
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def embedder(model: Any) -> Callable[[list[str]], Any]:
    """What a SentenceTransformer computes, without any prompt."""
    return lambda texts: model.encode(texts, prompt="", show_progress_bar=False)


def scorer(model: Any) -> Callable[[list[Any]], Any]:
    """A CrossEncoder's logits."""
    return lambda inputs: model.predict(inputs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
