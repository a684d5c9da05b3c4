"""What a server says, or does not, is JSON or one line; tokens go to it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from burnish.core.endpoint_calls import Endpoint, Refusal, call
from burnish.core.errors import ModelError

from ..loopback_models import Served, serving


@pytest.fixture
def served() -> Iterator[Served]:
    """A server whose vectors are the lengths of texts."""
    with serving(Served(embed=lambda texts: [[float(len(text))] for text in texts])) as found:
        yield found


def ask(served: Served, **more: Any) -> Any:
    endpoint = Endpoint(url=served.url, api="ollama", **more)
    return call(endpoint, endpoint.at("/api/embed"), {"model": "tiny", "input": ["four", "three"]})


def test_an_answer(served: Served) -> None:
    assert ask(served) == {"model": "tiny", "embeddings": [[1.0], [1.0]]}
    assert call(Endpoint(url=served.url, api="ollama"), f"{served.url}/api/version") == {"version": "0.12.0"}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"token": "secret"}, r"wants a token that it knows \(401\): no such key\. Pass the server's token"),
        ({"status": (403, {"detail": "not for you"})}, r"does not let this token do it \(403\): not for you\. "),
        ({"status": (404, b"<h1>gone</h1>")}, r"knows no such path or model \(404\): <h1>gone</h1>\. Pass the --api"),
        ({"status": (413, {"error": "too large"})}, r"takes no request of this size \(413\): too large"),
        ({"status": (429, {"message": "slow down"})}, r"takes no more requests for now \(429\): slow down\. Try again"),
        ({"status": (500, b"")}, r"has failed \(500\)\. Look at the server's log"),
        ({"status": (503, {"error": {"message": "loading"}})}, r"is not ready \(503\): loading\. Try again"),
        ({"status": (302, b"")}, r"sends requests on to http://127\.0\.0\.1:1/elsewhere \(302\)\. Pass that address"),
        ({"delay": 1.0}, r"gave no answer in 0\.3 s\. Pass a longer --timeout"),
        ({"raw": b"<html>\x1b[31m"}, r"answers what is no JSON: '<html>\?\[31m'"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(changed: dict[str, Any], line: str, served: Served) -> None:
    for key, value in changed.items():
        setattr(served, key, value)
    with pytest.raises(ModelError, match=line) as caught:
        ask(served, seconds=0.3)
    assert str(caught.value).startswith(f"{served.url}/api/embed: ") and "\n" not in str(caught.value)
    status = changed.get("status", (0,))[0]
    assert isinstance(caught.value, Refusal) == (status in (413, 500))


def test_an_answer_that_drips_is_not_waited_for(served: Served) -> None:
    served.raw, served.drip = b"[" + b" " * 40, 0.05
    with pytest.raises(ModelError, match=r"gave no answer in 0\.3 s"):
        ask(served, seconds=0.3)


def test_an_answer_that_ends_before_its_end(served: Served) -> None:
    served.raw, served.short = b"[1, 2]", 3
    with pytest.raises(ModelError, match=r"the connection failed \(IncompleteRead"):
        ask(served)


def test_nothing_answers() -> None:
    with pytest.raises(ModelError, match=r"^http://127\.0\.0\.1:1/embed: nothing answers there\. Start the server"):
        call(Endpoint(url="http://127.0.0.1:1", api="tei"), "http://127.0.0.1:1/embed")


def test_a_server_that_hangs_up(served: Served) -> None:
    served.given = lambda items: items[10**9][0]
    with pytest.raises(ModelError, match=r"the connection failed \("):
        ask(served)


def test_a_token_is_no_part_of_what_is_printed(served: Served) -> None:
    served.token = "a secret"
    assert "embeddings" in ask(served, token="a secret")
    assert "secret" not in repr(Endpoint(url=served.url, api="tei", token="a secret"))


@pytest.mark.parametrize(
    ("url", "path", "whole"),
    [
        ("http://h:1", "/v1/embeddings", "http://h:1/v1/embeddings"),
        ("http://h:1/", "/v1/embeddings", "http://h:1/v1/embeddings"),
        ("http://h:1/v1", "/v1/embeddings", "http://h:1/v1/embeddings"),
        ("http://h:1/v1/", "/v1/embeddings", "http://h:1/v1/embeddings"),
        ("https://h/v1/embeddings", "/v1/embeddings", "https://h/v1/embeddings"),
        ("http://h/a/b", "/embed", "http://h/a/b/embed"),
        ("http://h/v2/rerank", "/v1/rerank", "http://h/v2/rerank"),
        ("http://h/api", "/api/embed", "http://h/api/embed"),
        ("http://[::1]:8080", "/embed", "http://[::1]:8080/embed"),
    ],
)
def test_addresses(url: str, path: str, whole: str) -> None:
    endpoint = Endpoint(url=url, api="openai")
    assert endpoint.at(path) == whole
    assert replace(endpoint, url=whole).at(path) == whole
