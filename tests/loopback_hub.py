"""A Hugging Face Hub on this machine: the part of its API that huggingface_hub 1.5 to 2.x uses to push and to load.

Repositories, branches, pull requests, the large file store and commits are kept in memory. Every answer can be replaced
by a fault. Nothing of it is shared with a real Hub but the shapes of requests and answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".gguf", ".onnx", ".bin")
PART = 64 * 1024


@dataclass
class File:
    """One file of a commit; `sha256` for those in the large file store."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        pointer = self.content if self.sha256 is None else f"{self.sha256}\n{len(self.content)}".encode()
        return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Commits by id, and what the names of branches and pull requests point to."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, ref: str, tree: dict[str, File], message: str, description: str = "") -> str:
        oid = hashlib.sha1(f"{ref}{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = tree, (message, description), oid
        return oid

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: file.content for name, file in self.commits[self.refs[revision]].items()}


@dataclass
class Fault:
    """What is answered in place of the right thing.

    Args:
        where: Regular expression that "METHOD /path" has to match.
        status: The answer, or None to close the connection.
        times: How many requests it hits.
        skip: How many matching requests go through before.
        headers: Of the answer.
        message: The Hub's own words.
        late: Carry the request out, and only then fail.
    """

    where: str
    status: int | None = 500
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    late: bool = False


class Answer(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str = "", headers: dict[str, str] | None = None) -> None:
        self.status, self.message, self.headers = status, message, headers or {}


class Hub:
    """The server's state: read it in tests."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.xorbs: dict[str, bytes] = {}
        self.shards: list[bytes] = []
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.tokens: list[str | None] = []
        self.may_write = {"me", "org"}
        self.conflicts = 0
        self.lock = threading.RLock()

    def calls(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def fault(self, line: str) -> Fault | None:
        """The fault that hits a request, used up."""
        for fault in self.faults:
            if re.search(fault.where, line) and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None


Route = Callable[["Request", re.Match[str]], Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(f"{pattern}$"), function))
        return function

    return add


class Request(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # Without these two each answer waits 40 ms for the client's acknowledgement of its first line.
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: Hub
    server: ThreadingHTTPServer

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def body(self) -> bytes:
        if not hasattr(self, "_body"):
            if self.headers.get("Transfer-Encoding") == "chunked":
                self._body = b"".join(iter(self._chunk, b""))
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def repository(self, match: re.Match[str]) -> Repository:
        name = match["repo"]
        if name not in self.hub.repositories:
            raise Answer(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return self.hub.repositories[name]

    def commit_of(self, match: re.Match[str]) -> tuple[Repository, str]:
        repository = self.repository(match)
        oid = repository.at(unquote(match["revision"]))
        if oid is None:
            raise Answer(404, "Revision not found", {"X-Error-Code": "RevisionNotFound"})
        return repository, oid

    def check_write(self, name: str) -> None:
        if name.partition("/")[0] not in self.hub.may_write:
            raise Answer(403, "You don't have the rights to write to this namespace")

    def answer(self) -> None:
        self.__dict__.pop("_body", None)
        path, hub = urlsplit(self.path).path, self.hub
        line = f"{self.command} {self.path}"
        with hub.lock:
            hub.log.append(line)
            fault = hub.fault(line)
        if fault is not None and not fault.late:
            self.fail(fault)
            return
        self.body()
        try:
            result = self.serve(path)
            status, headers = 200, {}
        except Answer as other:
            result, status, headers = {"error": other.message}, other.status, other.headers
            headers = {**headers, "X-Error-Message": other.message}
        if fault is not None:
            self.fail(fault)
            return
        if isinstance(result, tuple):
            result, headers = result
        self.send(status, result, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def fail(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body()
        message = fault.message or f"injected {fault.status}"
        self.send(fault.status, {"error": message}, fault.headers)

    def serve(self, path: str) -> Any:
        for method, pattern, function in ROUTES:
            if method == ("GET" if self.command == "HEAD" else self.command) and (match := pattern.match(path)):
                if not path.startswith("/store/"):
                    token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                    self.hub.tokens.append(token)
                    if token != TOKEN:
                        raise Answer(401, "Invalid credentials in Authorization header")
                with self.hub.lock:
                    return function(self, match)
        raise Answer(404, f"this server has no {self.command} {path}")

    def send(self, status: int, result: Any, headers: dict[str, str]) -> None:
        content = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@route("GET", "/api/whoami-v2")
def whoami(request: Request, match: re.Match[str]) -> Any:
    return {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}, "orgs": [{"name": "org"}]}


@route("POST", "/api/repos/create")
def create(request: Request, match: re.Match[str]) -> Any:
    asked, hub = request.json(), request.hub
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    request.check_write(name)
    if hub.conflicts > 0:
        hub.conflicts -= 1
        raise Answer(409, "Cannot create repo: another conflicting operation is in progress")
    url = f"{hub.endpoint}/{name}"
    if name in hub.repositories:
        error = {"error": "You already created this model repo", "url": url}
        request.send(409, error, {"X-Error-Message": error["error"]})
        raise ConnectionError
    private = bool(asked.get("private") or asked.get("visibility") == "private")
    repository = hub.repositories[name] = Repository(private=private)
    repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
    return {"url": url, "name": name, "id": name}


@route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
def info(request: Request, match: re.Match[str]) -> Any:
    repository = request.repository(match)
    oid = repository.at(unquote(match["revision"] or "main"))
    if oid is None:
        raise Answer(404, "Revision not found", {"X-Error-Code": "RevisionNotFound"})
    siblings = [{"rfilename": name} for name in repository.commits[oid]]
    return {"id": match["repo"], "modelId": match["repo"], "sha": oid, "private": repository.private,
            "siblings": siblings, "tags": [], "downloads": 0}  # fmt: skip


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/.*)?")
def tree(request: Request, match: re.Match[str]) -> Any:
    repository, oid = request.commit_of(match)
    entries = []
    for name, file in repository.commits[oid].items():
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.oid, "size": len(file.content)}
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        entries.append(entry)
    return entries


@route("GET", f"/api/models/{REPO}/refs")
def refs(request: Request, match: re.Match[str]) -> Any:
    named = request.repository(match).refs.items()
    branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in named]
    return {"branches": branches, "converts": [], "tags": []}


@route("POST", f"/api/models/{REPO}/branch/(?P<revision>[^/]+)")
def branch(request: Request, match: re.Match[str]) -> Any:
    repository, name = request.repository(match), unquote(match["revision"])
    request.check_write(match["repo"])
    if name in repository.refs:
        raise Answer(409, "Reference already exists")
    repository.refs[name] = repository.refs["main"]
    return {}


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, match: re.Match[str]) -> Any:
    repository, oid = request.commit_of(match)
    there, answers = repository.commits[oid], []
    for asked in request.json()["files"]:
        file = there.get(asked["path"])
        mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
        answer = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
        answers.append(answer if file is None else {**answer, "oid": file.sha256 or file.oid})
    return {"files": answers}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def batch(request: Request, match: re.Match[str]) -> Any:
    hub, objects = request.hub, []
    request.check_write(match["repo"])
    for asked in request.json()["objects"]:
        oid, size, answer = asked["oid"], asked["size"], dict(asked)
        store = f"{hub.endpoint}/store/{oid}"
        if oid not in hub.large:
            upload: dict[str, Any] = {"href": store}
            if size > PART:
                count = -(-size // PART)
                header = {str(part): f"{store}/{part}" for part in range(1, count + 1)}
                upload = {"href": f"{store}/complete", "header": {"chunk_size": str(PART), **header}}
            verify = {"href": f"{hub.endpoint}/{match['repo']}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/store/(?P<oid>[0-9a-f]{64})")
def store(request: Request, match: re.Match[str]) -> Any:
    if hashlib.sha256(request.body()).hexdigest() != match["oid"]:
        raise Answer(400, "the content is not what was announced")
    request.hub.large[match["oid"]] = request.body()
    return {}


@route("PUT", "/store/(?P<oid>[0-9a-f]{64})/(?P<part>[0-9]+)")
def store_part(request: Request, match: re.Match[str]) -> Any:
    request.hub.parts[match["oid"], int(match["part"])] = request.body()
    return {}, {"ETag": hashlib.md5(request.body(), usedforsecurity=False).hexdigest()}


@route("POST", "/store/(?P<oid>[0-9a-f]{64})/complete")
def complete(request: Request, match: re.Match[str]) -> Any:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    content = b"".join(request.hub.parts[match["oid"], number] for number in numbers)
    if hashlib.sha256(content).hexdigest() != match["oid"]:
        raise Answer(400, "the parts are not what was announced")
    request.hub.large[match["oid"]] = content
    return {}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def verify(request: Request, match: re.Match[str]) -> Any:
    if request.json()["oid"] not in request.hub.large:
        raise Answer(404, "no such object")
    return {}


@route("GET", f"/api/models/{REPO}/xet-(read|write)-token/(?P<revision>[^/]+)")
def xet_token(request: Request, match: re.Match[str]) -> Any:
    """Where the chunks of large files go: to this server too, and to nothing that checks them."""
    request.check_write(match["repo"])
    url, token, end = f"{request.hub.endpoint}/store", "xet_loopback", 4102444800
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
    return {"casUrl": url, "accessToken": token, "exp": end}, headers


@route("POST", "/store/v1/xorbs/default/(?P<oid>[0-9a-f]{64})")
def xorb(request: Request, match: re.Match[str]) -> Any:
    fresh = match["oid"] not in request.hub.xorbs
    request.hub.xorbs[match["oid"]] = request.body()
    return {"was_inserted": fresh}


@route("POST", "/store/(v1/)?shards")
def shard(request: Request, match: re.Match[str]) -> Any:
    request.hub.shards.append(request.body())
    return {"result": 1}


def _tells_of(sha256: str, shard: bytes) -> bool:
    """Whether a shard names a file by its sha256, which stands there as four little-endian integers."""
    whole = bytes.fromhex(sha256)
    return whole in shard or b"".join(whole[at : at + 8][::-1] for at in range(0, 32, 8)) in shard


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(request: Request, match: re.Match[str]) -> Any:
    (repository, oid), ref = request.commit_of(match), unquote(match["revision"])
    request.check_write(match["repo"])
    header, *operations = [json.loads(line) for line in request.body().splitlines() if line]
    files = dict(repository.commits[oid])
    for operation in operations:
        value, path = operation["value"], operation["value"]["path"]
        if operation["key"] == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif operation["key"] == "lfsFile":
            oid = value["oid"]
            if oid not in request.hub.large and not any(_tells_of(oid, shard) for shard in request.hub.shards):
                raise Answer(400, f"{path} was not uploaded")
            # What came in chunks is not put together again.
            files[path] = File(request.hub.large.get(oid, bytes(value["size"])), oid)
        elif files.pop(path, None) is None:
            raise Answer(404, "A file with this name doesn't exist", {"X-Error-Code": "EntryNotFound"})
    made = repository.commit(ref, files, header["value"]["summary"], header["value"].get("description", ""))
    return {"success": True, "commitOid": made, "commitUrl": f"{request.hub.endpoint}/{match['repo']}/commit/{made}"}


@route("POST", f"/api/models/{REPO}/discussions")
def discuss(request: Request, match: re.Match[str]) -> Any:
    repository, asked = request.repository(match), request.json()
    assert asked["pullRequest"] is True
    repository.pull_requests.append((asked["title"], asked["description"]))
    number = len(repository.pull_requests)
    repository.refs[f"refs/pr/{number}"] = repository.refs["main"]
    return {"num": number}


@route("GET", f"/api/models/{REPO}/discussions/(?P<number>[0-9]+)")
def discussion(request: Request, match: re.Match[str]) -> Any:
    title, _ = request.repository(match).pull_requests[int(match["number"]) - 1]
    return {"title": title, "num": int(match["number"]), "isPullRequest": True, "status": "draft",
            "createdAt": "2026-01-01T00:00:00.000Z", "author": {"name": "me"}, "events": [], "diff": "",
            "filesWithConflicts": [], "changes": {"base": "refs/heads/main"},
            "repo": {"name": match["repo"], "type": "model"}}  # fmt: skip


@route("POST", "/api/validate-yaml")
def validate(request: Request, match: re.Match[str]) -> Any:
    if "bad: [" in request.json()["content"]:
        raise Answer(400, "bad metadata")
    return {"errors": [], "warnings": []}


@route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, match: re.Match[str]) -> Any:
    repository, oid = request.commit_of(match)
    file = repository.commits[oid].get(unquote(match["path"]))
    if file is None:
        raise Answer(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
    headers = {"ETag": f'"{file.sha256 or file.oid}"', "X-Repo-Commit": oid, "Content-Length": str(len(file.content)),
               "Content-Type": "application/octet-stream"}  # fmt: skip
    return file.content, headers


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that listens on a port of its own for the length of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnRequest", (Request,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
