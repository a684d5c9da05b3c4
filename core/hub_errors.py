"""What can go wrong on the way to the Hub, in words: is it worth another attempt, when, and what can the user do."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from .errors import BurnishError

Result = TypeVar("Result")

ATTEMPTS = 4
# Waits between attempts where the Hub names none, in seconds.
WAITS = (1.0, 4.0, 16.0)
# The Hub's windows are five minutes long. Whoever is told to wait for longer is told so, and not kept.
LONGEST_WAIT = 310.0
# How often the Hub may say that another repository is just being created.
_CONFLICTS = 6
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REMEDIES = {
    400: "Mend what the Hub says",
    401: "Run `hf auth login`, or pass token= with a token of https://huggingface.co/settings/tokens",
    402: "Mend the account's plan or storage",
    403: "Use a token that may write to this repository, or another repo_id",
    404: "Check repo_id and revision, and whether the token may see the repository",
    409: "Somebody else is changing the repository: try again",
    412: "Somebody else has changed the repository: try again",
    413: "The Hub takes no files of this size here",
    422: "Mend what the Hub says",
    429: "Wait as long as it says",
}
_MEANINGS = {
    401: "the Hub does not accept the token",
    402: "the Hub asks for payment",
    403: "the token may not do this",
    404: "the Hub knows no such repository or revision, or the token may not see it",
    429: "the Hub takes no more requests for now",
}


class HubError(BurnishError):
    """A push that did not arrive; the folder that was to be pushed is still there."""


class CreationConflict(Exception):
    """The Hub said again and again that another repository is being created."""


def cause(error: BaseException) -> BaseException:
    """What huggingface_hub wraps in a RuntimeError of its own where a large file does not go through."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, or None where the error is no answer of the Hub."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    # hf_xet has but one kind of error for everything on the network, with the answer in its words.
    found = _XET_STATUS.search(str(error)) if code is None else None
    return int(found[1]) if found else code


def lost_connection(error: BaseException) -> bool:
    """Whether the request got no answer at all."""
    # huggingface_hub 1 talks through httpx, 2 through httpx2; the one it uses is loaded by now.
    known = [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    # After a connection that could not be made, huggingface_hub 1.5 asks once more through the client it has closed.
    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    return closed or isinstance(error, (*known, ConnectionError, TimeoutError))


def wait_before(error: BaseException, attempt: int) -> float | None:
    """Seconds until an attempt after this one (counted from 1) is worth while; None where none is."""
    code = status(error)
    if attempt >= ATTEMPTS or not (code in _PASSING or lost_connection(error)):
        return None
    asked = _asked_wait(error) if code in (429, 503) else None
    wait = WAITS[attempt - 1] if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def _asked_wait(error: BaseException) -> float | None:
    """What the Hub's headers say: `Retry-After`, as seconds or a date, or else the end of its rate limit's window."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    given = next((value.strip() for key, value in headers.items() if key.lower() == "retry-after"), "")
    if given.isdigit():
        return float(given)
    if given:
        try:
            return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
        except ValueError:
            return None
    limit = parse_ratelimit_headers(headers)
    return None if limit is None or limit.remaining else float(limit.reset_in_seconds)


def persist(step: str, call: Callable[[], Result], *, repeatable: bool = True) -> Result:
    """What `call` returns, tried up to `ATTEMPTS` times where its fault is a passing one; each wait is told.

    Args:
        step: What is being done, for the line that tells.
        call: A request to the Hub.
        repeatable: Whether a request that the Hub may have carried out can be sent once more. Where not, only a refusal
            for too many requests is tried again.
    """
    attempt = 1
    while True:
        try:
            return call()
        except Exception as raised:
            error = cause(raised)
            wait = wait_before(error, attempt) if repeatable or status(error) == 429 else None
            if wait is None:
                raise
            line = f"{step}: {meaning(error)}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.0f} s"
            print(f"burnish: {line}", file=sys.stderr, flush=True)
        time.sleep(wait)
        attempt += 1


def meaning(error: BaseException) -> str:
    """What happened, in a few words on one line."""
    code = status(error)
    if code is not None:
        said = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
        words = _MEANINGS.get(code, "the Hub refuses" if code < 500 else "the Hub has a fault")
        return f"{words} ({code}{': ' + said if said else ''})"
    line = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, CreationConflict):
        return line
    if lost_connection(error):
        return f"the connection was lost ({line or type(error).__name__})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space is left on the disk"
    return line or type(error).__name__


def remedy(error: BaseException) -> str:
    """What the user can do about it."""
    code = status(error)
    if code == 429 and (asked := _asked_wait(error)) is not None:
        return f"Wait {asked:.0f} s"
    if code is not None:
        return _REMEDIES.get(code, "Try again later")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "Free some space"
    if "offline" in type(error).__name__.lower():
        return "Unset HF_HUB_OFFLINE"
    return "Check the network and HF_ENDPOINT" if lost_connection(error) else "Mend the cause"


def expected(error: BaseException) -> bool:
    """Whether an error is the Hub's, the network's or the disk's; anything else is a fault of a program."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    error = cause(error)
    native = type(error).__module__.partition(".")[0] in ("hf_xet", "builtins") and isinstance(error, RuntimeError)
    kinds = (HfHubHTTPError, HFValidationError, CreationConflict, OSError, ValueError)
    return isinstance(error, kinds) or lost_connection(error) or native


@contextmanager
def bounded_creation() -> Iterator[None]:
    """Within the block, `HfApi.create_repo` gives up at some time.

    While the Hub answers that another repository of the user is being created, it asks again at once and without end.

    Raises:
        CreationConflict: When that has been the answer for half a minute.
    """
    from huggingface_hub import get_session

    answers = 0

    def count(response: Any) -> None:
        nonlocal answers
        answers += response.status_code == 409
        if response.status_code == 409 and answers == _CONFLICTS:
            raise CreationConflict("the Hub is busy with creating another repository of this account (409)")
        if response.status_code == 409 and answers > 1:  # the first is also how it says that the repository exists
            time.sleep(2.0 ** (answers - 2))

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), count]}
    try:
        yield
    finally:
        client.event_hooks = hooks
