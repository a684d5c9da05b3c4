"""Reranking folders, and how well a model orders the candidates in them.

A reranking folder holds what a first stage found, in the first stage's order:

* corpus.jsonl[.gz]: {"_id": "d0", "text": "…", "title": "…"}, where title is optional;
* <split>.jsonl[.gz]: {"query": "…", "doc_ids": ["d0", …], "labels": [0, …], "n_relevant": 1}. A label above 0 means
  relevant. `n_relevant` counts the relevant documents of the whole corpus, where the first stage may have missed some;
  left out, it is those among the candidates. A query may have an `_id`; left out, it is the row's number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, DataError, ModelError
from .evaluate import Metric, bootstrap, ndcg
from .readers import Row, jsonl_rows, place
from .retrieval_data import RetrievalData, checked_row, identified_rows, string_cell, text_of, texts_file

if TYPE_CHECKING:
    from .cross_encoder import CrossEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankingData:
    """Queries with candidates to put in order.

    Args:
        name: What it is called, e.g. `attack_rerank-test`.
        queries: {id: text}.
        corpus: {id: text} of all documents; a title stands before the text, with a space between.
        candidates: {query id: document ids in the first stage's order}.
        relevant: {query id: ids of the documents known to be relevant}, among the candidates or not.
        counts: {query id: how many documents of the corpus are relevant}, at least as many as are known.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    candidates: dict[str, tuple[str, ...]]
    relevant: dict[str, frozenset[str]]
    counts: dict[str, int]


def with_candidates(data: RetrievalData, candidates: Mapping[str, Sequence[str]]) -> RerankingData:
    """A retrieval folder's queries with what a first stage (BM25, an embedding model) found for them.

    Args:
        data: From `load_retrieval`.
        candidates: {query id: document ids, best first}, for every query.

    Raises:
        DataError: A query has no candidates, a document is there twice for one, or an id is unknown.
    """
    for query in data.queries:
        if not candidates.get(query):
            raise DataError("has no candidates", where=f"query {query!r}", fix="Add some, or leave the query out")
        _check_ids(candidates[query], data.corpus, f"query {query!r}")
    for query in candidates:
        if query not in data.queries:
            raise DataError("has candidates and no text", where=f"query {query!r}", fix="Add the query, or drop it")
    return RerankingData(
        name=data.name,
        queries=dict(data.queries),
        corpus=dict(data.corpus),
        candidates={query: tuple(candidates[query]) for query in data.queries},
        relevant={query: frozenset(data.relevant[query]) for query in data.queries},
        counts={query: len(data.relevant[query]) for query in data.queries},
    )


def is_reranking(folder: Path, split: str) -> bool:
    """Whether a folder has candidates for a split, and no judgements of whole searches."""
    there = any((folder / f"{split}.jsonl{packed}").is_file() for packed in ("", ".gz"))
    return there and not (folder / "qrels").exists()


def load_reranking(folder: Path, split: str, *, max_queries: int | None = None) -> RerankingData:
    """Read and check one split of a reranking folder.

    Args:
        folder: Holds `corpus.jsonl` and `<split>.jsonl` (each also .gz).
        split: Which file of queries.
        max_queries: Read at most this many, from the start.

    Raises:
        DataError: A file is missing or unreadable, a row is bad, or an id occurs twice or is unknown.
    """
    if not folder.is_dir():
        fix = "Name a folder with corpus.jsonl and a file of queries for each split"
        raise DataError("there is no such folder", where=str(folder), fix=fix)
    corpus_path, path = texts_file(folder, "corpus"), texts_file(folder, split)
    corpus: dict[str, str] = {}
    for row, key in identified_rows(corpus_path, corpus):
        corpus[key] = text_of(row, corpus_path)
    found = RerankingData(
        name=f"{folder.absolute().name}-{split}", queries={}, corpus=corpus, candidates={}, relevant={}, counts={}
    )
    for item in jsonl_rows(path):
        if len(found.queries) == max_queries:
            break
        _add(found, checked_row(item, path), path)
    if not found.queries:
        raise DataError("has no rows", where=str(path), fix='Write one {"query": …, "doc_ids": …, "labels": …} a line')
    return found


def _add(data: RerankingData, row: Row, path: Path) -> None:
    """Put one row of a split's file into the data."""
    where = place(str(path), row.number)
    key = string_cell(row, "_id", path) if "_id" in row.cells else str(row.number)
    if key in data.queries:
        raise DataError(f"'{key}' occurs twice", where=where, fix="Give every query an _id of its own")
    text, cells = string_cell(row, "query", path), row.cells
    documents, labels = cells.get("doc_ids"), cells.get("labels")
    if not isinstance(documents, list) or not documents or not all(isinstance(one, str) for one in documents):
        raise DataError("is no list of document ids", where=place(str(path), row.number, "doc_ids"), fix="Add one")
    _check_ids(documents, data.corpus, where)
    if not isinstance(labels, list) or len(labels) != len(documents) or not all(map(_is_number, labels)):
        what = f"is no list of {len(documents)} numbers, one for each of doc_ids"
        raise DataError(what, where=place(str(path), row.number, "labels"), fix="Give 1 for relevant, 0 for others")
    relevant = frozenset(one for one, label in zip(documents, labels, strict=True) if label > 0)
    count = cells.get("n_relevant", len(relevant))
    if not isinstance(count, int) or isinstance(count, bool) or count < len(relevant):
        what = f"{count!r} is not the number of relevant documents, of which {len(relevant)} are candidates"
        raise DataError(what, where=place(str(path), row.number, "n_relevant"), fix="Count them, or leave it out")
    data.queries[key], data.candidates[key] = text, tuple(documents)
    data.relevant[key], data.counts[key] = relevant, count


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and np.isfinite(value)


def _check_ids(documents: Sequence[str], corpus: Mapping[str, str], where: str) -> None:
    if unknown := next((one for one in documents if one not in corpus), None):
        raise DataError(f"document '{unknown}' is unknown", where=where, fix="Add it to the corpus, or remove it")
    if len(set(documents)) < len(documents):
        raise DataError("a document is a candidate twice", where=where, fix="Remove one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankingResult:
    """How well candidates were put in order; means are over the queries that have a relevant document at all.

    Args:
        k: The depth at which everything was cut off.
        ndcg, mrr: As `evaluate` defines them, the ideal counting relevant documents that are no candidates too.
        first: nDCG of the order that the candidates came in.
        best: nDCG of the best order of these candidates: what a first stage missed, nobody can put in order.
        per_query: {query id: (nDCG, reciprocal rank)}.
        seconds: Wall clock of scoring.
        pairs: Texts that were scored.
    """

    k: int
    ndcg: Metric
    mrr: Metric
    first: float
    best: float
    per_query: dict[str, tuple[float, float]]
    seconds: float
    pairs: int

    def metrics(self) -> dict[str, float]:
        """The means: `{"ndcg@10": …, "mrr@10": …}` for k = 10."""
        return {f"ndcg@{self.k}": self.ndcg.mean, f"mrr@{self.k}": self.mrr.mean}

    def as_json(self) -> dict[str, Any]:
        """The means, `intervals` (`{"ndcg@10": [low, high], …}`), both bounds and the count, ready for `json.dumps`."""
        named = {f"ndcg@{self.k}": self.ndcg, f"mrr@{self.k}": self.mrr}
        return {
            **self.metrics(),
            "intervals": {name: [metric.low, metric.high] for name, metric in named.items()},
            "as they came": {f"ndcg@{self.k}": self.first},
            "at best": {f"ndcg@{self.k}": self.best},
            "queries": len(self.per_query),
            "pairs": self.pairs,
        }

    def __str__(self) -> str:
        within = f"{self.ndcg.low:.3f} to {self.ndcg.high:.3f}, {len(self.per_query)} queries"
        return f"nDCG@{self.k} {self.ndcg.mean:.3f} ({within}; as they came {self.first:.3f}, at best {self.best:.3f})"


def evaluate_reranking(
    model: Any,
    data: RerankingData,
    *,
    k: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
    progress: bool = False,
) -> RerankingResult:
    """Put every query's candidates in the order of the model's scores, and score the order.

    Candidates with equal scores rank by ascending document id. Intervals are 95% percentile bootstrap over queries.

    Args:
        model: A `CrossEncoder` with one label, or anything with its `predict`.
        data: The queries and candidates. Queries without any relevant document have no score and are left out.
        k: Cut-off of the metrics, at least 1.
        batch_size: Pairs in a forward pass.
        seed: Seed of the bootstrap.
        resamples: Bootstrap resamples.
        progress: Show Sentence Transformers' own bar.

    Raises:
        ConfigError: `k`, `batch_size` or `resamples` below 1.
        DataError: No query has a relevant document.
        ModelError: The model gives more than one score a pair, or one that is not finite.
    """
    for name, number in (("k", k), ("batch_size", batch_size), ("resamples", resamples)):
        if number < 1:
            raise ConfigError(f"{name} is {number}", where="evaluate_reranking", fix=f"Give {name} of at least 1")
    queries = [query for query in data.queries if data.counts[query]]
    if not queries:
        raise DataError("no query has a relevant document", where=data.name, fix="Add judgements")
    began = time.perf_counter()
    pairs = [(data.queries[query], data.corpus[one]) for query in queries for one in data.candidates[query]]
    scores = np.asarray(model.predict(pairs, batch_size=batch_size, show_progress_bar=progress), np.float64)
    seconds = time.perf_counter() - began
    if scores.shape != (len(pairs),):
        what = f"the model gives {scores.shape[1:]} scores a pair, not one"
        raise ModelError(what, where="evaluation", fix="Load a cross-encoder with one label")
    if not np.isfinite(scores).all():
        fix = "The training diverged or the dtype overflows: lower the learning rate, or use float32"
        raise ModelError("the model's scores are not finite", where="evaluation", fix=fix)
    parts = np.split(scores, np.cumsum([len(data.candidates[query]) for query in queries])[:-1])
    got, first, best = {}, [], []
    for query, part in zip(queries, parts, strict=True):
        candidates, relevant, count = data.candidates[query], data.relevant[query], data.counts[query]
        ranked = [one for _, one in sorted(zip(-part, candidates, strict=True))]
        got[query] = (_ndcg(ranked, relevant, count, k), _reciprocal_rank(ranked, relevant, k))
        first.append(_ndcg(candidates, relevant, count, k))
        best.append(_ndcg(sorted(candidates, key=lambda one: one not in relevant), relevant, count, k))
    gain, mrr = bootstrap(np.array(list(got.values())), seed=seed, resamples=resamples)
    return RerankingResult(
        k=k,
        ndcg=gain,
        mrr=mrr,
        first=float(np.mean(first)),
        best=float(np.mean(best)),
        per_query=got,
        seconds=seconds,
        pairs=len(pairs),
    )


def load_reranker(name: str, **load: Any) -> CrossEncoder:
    """A cross-encoder that can score pairs: one label, and a head that was trained.

    Args:
        name: Hub id or folder.
        **load: Parameters of `FastCrossEncoder.from_pretrained`.

    Raises:
        ModelError: If it has another number of labels, or no head at all, so that a fresh one would answer at random.
    """
    from .fast_cross_encoder import FastCrossEncoder
    from .heads import fresh_modules

    model = FastCrossEncoder.from_pretrained(name, **load)
    where = f"model {name}"
    drawn = fresh_modules(model.transformers_model) if model.transformers_model is not None else []
    if drawn:
        what = f"it has no head to score pairs with: {', '.join(drawn)} would be drawn at random"
        raise ModelError(what, where=where, fix="Name a cross-encoder, or train this one first")
    if model.num_labels != 1:
        what = f"it gives {model.num_labels} numbers a pair, not one"
        raise ModelError(what, where=where, fix="Name a cross-encoder with one label")
    return model


def _ndcg(ranked: Sequence[str], relevant: frozenset[str], count: int, k: int) -> float:
    return ndcg([rank for rank, one in enumerate(ranked[:k], start=1) if one in relevant], count, k)


def _reciprocal_rank(ranked: Sequence[str], relevant: frozenset[str], k: int) -> float:
    return next((1 / rank for rank, one in enumerate(ranked[:k], start=1) if one in relevant), 0.0)
