"""Asks a server over HTTP and gets JSON; whatever goes wrong on the way is one line."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .errors import ConfigError, ModelError

SECONDS = 60.0
# A vector of 8192 numbers as text is 200 kB; a server that sends more than this is not answering.
_LARGEST = 256 * 2**20
# llama.cpp's server has failed, it says, where a text is too long for it.
_REFUSED = (400, 413, 422, 500)
_REMEDIES = {
    400: "See what the server says",
    401: "Pass the server's token with --token, or in BURNISH_URL_TOKEN",
    403: "Pass a token that may do this with --token, or in BURNISH_URL_TOKEN",
    404: "Pass the --api that this server speaks, its base address, and the --model that it serves",
    405: "Pass the --api that this server speaks",
    413: "Let the server take larger requests",
    422: "See what the server says",
    429: "Try again when it has less to do",
    503: "Try again when it has started",
}
_MEANINGS = {
    401: "wants a token that it knows",
    403: "does not let this token do it",
    404: "knows no such path or model",
    405: "does not take POST there",
    413: "takes no request of this size",
    429: "takes no more requests for now",
    503: "is not ready",
}


class Refusal(ModelError):
    """The server is there, and will not take this input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server that serves a model.

    Args:
        url: Its base address, or that of the endpoint itself.
        api: What it speaks: one of `endpoints.APIS`.
        model: What it calls the model; None for the only one that it serves.
        token: Sent as a bearer token.
        seconds: How long one answer may take.
        batch: Texts in a request.
    """

    url: str
    api: str
    model: str | None = None
    token: str | None = field(default=None, repr=False)
    seconds: float = SECONDS
    batch: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            fix = "Pass an address, as in http://127.0.0.1:8080"
            raise ConfigError("is no address of a server", where=f"--url {self.url}", fix=fix)
        if parts.username is not None or parts.query or parts.fragment:
            fix = "Leave out user, query and fragment; a token goes to --token"
            raise ConfigError("has more than an address", where=f"--url {parts.scheme}://{parts.hostname}", fix=fix)
        if self.seconds <= 0:
            raise ConfigError(f"{self.seconds} is no time", where="--timeout", fix="Pass seconds, such as 60")

    def at(self, path: str) -> str:
        """The address of an endpoint: what the base address has of its path already is not said twice."""
        parts = urlsplit(self.url)
        base = parts.path.rstrip("/")
        above, _, last = path.rpartition("/")
        if base.endswith(f"/{last}"):
            path = ""
        elif above and base.endswith(above):
            path = f"/{last}"
        return urlunsplit((parts.scheme, parts.netloc, base + path, "", ""))

    def root(self, path: str) -> str:
        """The address of a path of the server's own, beside its endpoints."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect would turn POST into GET, and take the token to somebody else."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


def call(endpoint: Endpoint, address: str, body: Any = None) -> Any:
    """What a server answers to a request; POST where there is a body, else GET.

    Raises:
        Refusal: If the server will not take the input.
        ModelError: For everything else that is no answer.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Accept": "application/json", "User-Agent": "burnish-verify"}
    headers |= {"Content-Type": "application/json"} if data is not None else {}
    headers |= {"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {}
    request = urllib.request.Request(address, data=data, headers=headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=endpoint.seconds) as answer:
            text = _read(answer, endpoint.seconds)
    except urllib.error.HTTPError as error:
        with error:  # it is an answer, and holds the connection
            raise _told(error, address) from error
    except (TimeoutError, urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise _unheard(error, address, endpoint.seconds) from error
    try:
        return json.loads(text)
    except ValueError as error:
        what = f"answers what is no JSON: {_printable(text[:80])!r}"
        raise ModelError(what, where=address, fix="Pass the address of the model's server") from error


def _read(answer: Any, seconds: float) -> bytes:
    """All of an answer; a server that sends a little now and then is not waited for for ever."""
    until, parts, size = time.monotonic() + seconds, [], 0
    while part := answer.read1(2**20):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError
        if size > _LARGEST:
            raise http.client.HTTPException(f"it sent more than {_LARGEST // 2**20} MiB")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)


def _told(error: urllib.error.HTTPError, address: str) -> ModelError:
    """An error that the server sent."""
    status = error.code
    if 300 <= status < 400:
        place = _printable(error.headers.get("Location", "elsewhere").encode())
        return ModelError(f"sends requests on to {place} ({status})", where=address, fix="Pass that address")
    try:
        said = _reason(error.read(4096))
    except (OSError, http.client.HTTPException):
        said = ""  # the status alone has come through
    meaning = _MEANINGS.get(status, "refuses the request" if status < 500 else "has failed")
    what = f"{meaning} ({status})" + (f": {said}" if said else "")
    kind = Refusal if status in _REFUSED else ModelError
    return kind(what, where=address, fix=_REMEDIES.get(status, "Look at the server's log"))


def _unheard(error: Exception, address: str, seconds: float) -> ModelError:
    """A server that did not answer."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        fix = "Pass a longer --timeout, or look at the server's log"
        return ModelError(f"gave no answer in {seconds:g} s", where=address, fix=fix)
    if isinstance(reason, ConnectionRefusedError):
        return ModelError("nothing answers there", where=address, fix="Start the server, or pass its address")
    said = _printable(str(reason).encode()) or type(reason).__name__
    return ModelError(f"the connection failed ({said})", where=address, fix="Pass an address that can be reached")


def _reason(text: bytes) -> str:
    """What an error says, in any of the shapes that these servers give it."""
    try:
        found = json.loads(text)
    except ValueError:
        return _printable(text[:200])
    for _ in range(2):
        if isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), found)
    return _printable((found if isinstance(found, str) else json.dumps(found)).encode())[:200]


def _printable(text: bytes) -> str:
    """On one line, and without what would move a terminal's cursor."""
    line = " ".join(text.decode("utf-8", "replace").split())
    return "".join(character if character.isprintable() else "?" for character in line)
