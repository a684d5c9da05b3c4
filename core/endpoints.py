"""What running servers are asked, in each of the ways that they speak, and what their answers say.

They get texts with their prompts before them, since none puts one there unless it was told to. Inputs that are empty or
too long are asked alone: a server may refuse them, and is still compared by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .endpoint_calls import Endpoint, Refusal, call
from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from .deploy import Description

Rows: TypeAlias = list[list[float]]


@dataclass(frozen=True, slots=True)
class _Ask:
    """What one request needs beside its inputs."""

    endpoint: Endpoint
    path: str
    model: str | None
    deploy: Description

    def __call__(self, **body: Any) -> Any:
        named = {} if self.model is None else {"model": self.model}
        return call(self.endpoint, self.where, named | body)

    @property
    def where(self) -> str:
        return self.endpoint.at(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One endpoint: its path, and how it gives a row of numbers for each input."""

    path: str
    ask: Callable[[_Ask, Sequence[Any]], Rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """How a kind of server is spoken to.

    Args:
        embeddings: For embeddings.
        scores: For a reranker's score of a pair.
        classes: For a classifier's logits.
        models: The path that lists models by `id`; "" where none has to be named.
        version: The path that tells the version; "" where there is none.
    """

    embeddings: Kind | None = None
    scores: Kind | None = None
    classes: Kind | None = None
    models: str = ""
    version: str = ""


def _field(found: Any, key: str, where: str) -> Any:
    if not isinstance(found, dict) or key not in found:
        fix = "Pass the --api that this server speaks"
        raise ModelError(f"its answer has no {key!r}", where=where, fix=fix)
    return found[key]


def _list(found: Any, count: int, where: str) -> list[Any]:
    if not isinstance(found, list):
        fix = "Pass the --api that this server speaks"
        raise ModelError("its answer is no list", where=where, fix=fix)
    if len(found) != count:
        raise ModelError(f"it answers {len(found)} results to {count} inputs", where=where)
    return found


def _ordered(found: Any, key: str, count: int, where: str) -> list[Any]:
    """What a list of objects has under a key, in the order that the field `index` of each tells."""
    items = _list(found, count, where)
    places = [_field(item, "index", where) for item in items]
    if sorted(map(str, places)) != sorted(map(str, range(count))):
        raise ModelError(f"its answers are numbered {places}, not from 0 to {count - 1}", where=where)
    values = dict(zip(map(int, places), (_field(item, key, where) for item in items), strict=True))
    return [values[place] for place in range(count)]


def _openai(ask: _Ask, texts: Sequence[Any], **more: Any) -> Rows:
    found = ask(input=list(texts), encoding_format="float", **more)
    return _ordered(_field(found, "data", ask.where), "embedding", len(texts), ask.where)


def _vllm_embeddings(ask: _Ask, texts: Sequence[Any]) -> Rows:
    # It refuses what is too long unless it is told where to cut.
    return _openai(ask, texts, truncate_prompt_tokens=ask.deploy["max_seq_length"] or -1)


def _tei_embeddings(ask: _Ask, texts: Sequence[Any]) -> Rows:
    # It normalises unless it is told not to.
    found = ask(inputs=list(texts), truncate=True, normalize=bool(ask.deploy["normalize"]))
    return _list(found, len(texts), ask.where)


def _ollama(ask: _Ask, texts: Sequence[Any]) -> Rows:
    found = _field(ask(input=list(texts)), "embeddings", ask.where)
    return _list(found, len(texts), ask.where)


def _by_query(pairs: Sequence[Any], rank: Callable[[str, list[str]], list[Any]]) -> Rows:
    """Scores of pairs, by requests with one query and all its documents."""
    rows: list[Any] = [None] * len(pairs)
    for query in dict.fromkeys(pair[0] for pair in pairs):
        places = [place for place, pair in enumerate(pairs) if pair[0] == query]
        for place, score in zip(places, rank(query, [pairs[place][1] for place in places]), strict=True):
            rows[place] = [score]
    return rows


def _tei_scores(ask: _Ask, pairs: Sequence[Any]) -> Rows:
    def rank(query: str, texts: list[str]) -> list[Any]:
        found = ask(query=query, texts=texts, truncate=True, raw_scores=True)
        return _ordered(found, "score", len(texts), ask.where)

    return _by_query(pairs, rank)


def _cohere(ask: _Ask, pairs: Sequence[Any]) -> Rows:
    def rank(query: str, documents: list[str]) -> list[Any]:
        found = ask(query=query, documents=documents, top_n=len(documents))
        return _ordered(_field(found, "results", ask.where), "relevance_score", len(documents), ask.where)

    return _by_query(pairs, rank)


def _vllm_scores(ask: _Ask, pairs: Sequence[Any]) -> Rows:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    longest = ask.deploy["max_seq_length"] or -1
    found = ask(text_1=first, text_2=second, truncate_prompt_tokens=longest, use_activation=False)
    scores = _ordered(_field(found, "data", ask.where), "score", len(pairs), ask.where)
    return [score if isinstance(score, list) else [score] for score in scores]


def _tei_classes(ask: _Ask, inputs: Sequence[Any]) -> Rows:
    given = [one if isinstance(one, list) else [one] for one in inputs]
    found = _list(ask(inputs=given, truncate=True, raw_scores=True), len(inputs), ask.where)
    labels, rows = ask.deploy["labels"], []
    for one in found:
        items = _list(one, len(labels), ask.where)
        scores = {str(_field(item, "label", ask.where)): _field(item, "score", ask.where) for item in items}
        if sorted(scores) != sorted(labels):
            raise ModelError(f"its labels are {sorted(scores)}, not {sorted(labels)}", where=ask.where)
        rows.append([scores[label] for label in labels])
    return rows


def _vllm_classes(ask: _Ask, inputs: Sequence[Any]) -> Rows:
    if any(isinstance(one, list) for one in inputs):
        raise ConfigError("vLLM classifies single texts, and this model pairs", where="--api vllm")
    longest = ask.deploy["max_seq_length"] or -1
    found = ask(input=list(inputs), truncate_prompt_tokens=longest, use_activation=False)
    return _ordered(_field(found, "data", ask.where), "probs", len(inputs), ask.where)


_EMBEDDINGS = Kind(path="/v1/embeddings", ask=_openai)
_RERANK = Kind(path="/v1/rerank", ask=_cohere)
APIS = {
    "openai": Api(embeddings=_EMBEDDINGS, models="/v1/models"),
    "tei": Api(
        embeddings=Kind(path="/embed", ask=_tei_embeddings),
        scores=Kind(path="/rerank", ask=_tei_scores),
        classes=Kind(path="/predict", ask=_tei_classes),
        version="/info",
    ),
    "ollama": Api(embeddings=Kind(path="/api/embed", ask=_ollama), models="/v1/models", version="/api/version"),
    "cohere": Api(scores=_RERANK, models="/v1/models"),
    "vllm": Api(
        embeddings=Kind(path="/v1/embeddings", ask=_vllm_embeddings),
        scores=Kind(path="/score", ask=_vllm_scores),
        classes=Kind(path="/classify", ask=_vllm_classes),
        models="/v1/models",
        version="/version",
    ),
}


def answers(endpoint: Endpoint, request: dict[str, Any]) -> dict[str, Any]:
    """What a server makes of a request as scripts of `consumers` get it, in their form.

    A row is None, and `notes` say so, where the server refused an input that is empty or too long.

    Raises:
        ConfigError: For an API that is unknown, or gives nothing of this kind.
        ModelError: If the server does not answer, or with something else.
    """
    if endpoint.api not in APIS:
        raise ConfigError(f"{endpoint.api!r} is unknown", where="--api", fix=f"Known: {', '.join(APIS)}")
    api, described = APIS[endpoint.api], request["deploy"]
    what = _what(request)
    kind: Kind | None = getattr(api, what)
    if kind is None:
        others = ", ".join(name for name, one in APIS.items() if getattr(one, what) is not None)
        fix = f"Those that do: {others}"
        raise ConfigError(f"has no endpoint for {what}", where=f"--api {endpoint.api}", fix=fix)
    name = endpoint.model or (_served(endpoint, api.models) if api.models else None)
    ask = _Ask(endpoint, kind.path, name, described)
    outputs, notes = _all(ask, kind, request)
    return {"versions": _versions(endpoint, api), "outputs": outputs, "token_ids": None, "notes": notes}


def _what(request: dict[str, Any]) -> str:
    """The field of an `Api` that gives what the model gives."""
    if request["kind"] == "embeddings":
        return "embeddings"
    if len(request["deploy"]["labels"] or ()) > 1:
        return "classes"
    if not all(isinstance(one, list) for one in request["inputs"]):
        raise ConfigError("servers score pairs, and this model single texts", where=f"--url, {request['folder']}")
    return "scores"


def _all(ask: _Ask, kind: Kind, request: dict[str, Any]) -> tuple[list[Any], list[str]]:
    inputs = request["texts"] if request["kind"] == "embeddings" else request["inputs"]
    rows: list[Any] = [None] * len(inputs)
    other = set(ask.deploy.get("other_tokens", ()))
    asked = [place for place in range(len(inputs)) if place not in other]
    odd = {place: why for place in asked if (why := _odd(inputs[place], request["token_ids"][place], ask))}
    plain = [place for place in asked if place not in odd]
    size = ask.endpoint.batch
    for places in (plain[start : start + size] for start in range(0, len(plain), size)):
        for place, row in zip(places, kind.ask(ask, [inputs[place] for place in places]), strict=True):
            rows[place] = _numbers(row, ask.where)
    refused: dict[str, list[str]] = {}
    for place, why in odd.items():
        try:
            (row,) = kind.ask(ask, [inputs[place]])
            rows[place] = _numbers(row, ask.where)
        except Refusal as error:
            refused.setdefault(why, []).append(error.what)
    if len(widths := {len(row) for row in rows if row is not None}) > 1:
        raise ModelError(f"it gives rows of {sorted(widths)} numbers, not of one length", where=ask.where)
    return rows, [*_left_out(len(other), len(inputs)), *_refused(refused, len(inputs))]


def _left_out(count: int, whole: int) -> list[str]:
    line = f"{count} of {whole} inputs become other tokens there, as deploy.json says, and are not compared"
    return [line] if count else []


def _refused(found: Mapping[str, Sequence[str]], whole: int) -> list[str]:
    return [
        f"it refuses what is {why}, {len(said)} of {whole} inputs, which are not compared: {said[0]}"
        for why, said in found.items()
    ]


def _odd(given: Any, ids: list[int] | None, ask: _Ask) -> str:
    """Why a server may refuse an input, or ""."""
    parts = given if isinstance(given, list) else [given]
    if not all(part.strip() for part in parts):
        return "empty"
    longest = ask.deploy["max_seq_length"]
    return "too long" if longest is not None and ids is not None and len(ids) >= longest else ""


def _numbers(row: Any, where: str) -> list[float]:
    good = isinstance(row, list) and row and all(type(one) in (int, float) for one in row)
    if not good or any(one != one or one in (float("inf"), float("-inf")) for one in row):
        said = repr(row)
        raise ModelError(f"it gives {said[:60]} where numbers are due", where=where, fix="Look at the server's log")
    return [float(one) for one in row]


def _served(endpoint: Endpoint, path: str) -> str:
    """The only model that a server has."""
    where = endpoint.root(path)
    found = _field(call(endpoint, where), "data", where)
    names = [str(_field(item, "id", where)) for item in (found if isinstance(found, list) else [])]
    if len(names) != 1:
        said = f"serves {', '.join(names)}" if names else "names no model"
        raise ConfigError(f"{endpoint.url} {said}", where="--model", fix="Name the one to ask for")
    return names[0]


def _versions(endpoint: Endpoint, api: Api) -> dict[str, str]:
    """What the server says it is; it need not say."""
    if not api.version:
        return {}
    try:
        found = call(endpoint, endpoint.root(api.version))
    except ModelError:
        return {}  # it has answered what it was asked for: only its name stays unknown
    version = found.get("version") if isinstance(found, dict) else None
    return {endpoint.api: version} if isinstance(version, str) else {}
