"""Retrieval scores on held-out queries, each with the interval that its number of queries allows.

All relevance is binary. For one query, with `k` results and `R` the set of its relevant documents:

* `ndcg` is DCG/ideal DCG, where DCG sums 1 / log2(rank + 1) over the relevant results among the first `k`, and
  the ideal has min(k, |R|) of them on top (Järvelin & Kekäläinen 2002, in the log2 form that TREC and BEIR use);
* `recall` is the share of `R` among the first `k`;
* `mrr` is 1 / rank of the first relevant result, 0 where that is not among the first `k`.

Documents with equal scores rank by ascending id. Means and intervals are over queries; the intervals are 95%
percentile bootstrap (Efron & Tibshirani 1993, chapter 13), the paired ones as in Sakai (2006).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

NAMES = ("ndcg", "recall", "mrr")
# One block of scores holds at most this many numbers: 64 MiB in float32, whatever the size of the corpus.
BLOCK = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A mean over queries, between 0 and 1 (a difference: -1 and 1), with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What one query got.

    Args:
        ndcg: nDCG among the first k, 0 to 1.
        recall: Share of the relevant documents among the first k.
        mrr: Reciprocal rank of the first relevant document, 0 where it is not among the first k.
        top: The first k documents with their scores, best first; fewer where the corpus is smaller.
        rank: Rank of the first relevant document in the whole corpus, counted from 1.
        best: The id of that document.
    """

    ndcg: float
    recall: float
    mrr: float
    top: tuple[tuple[str, float], ...]
    rank: int
    best: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalResult:
    """Means with intervals, and every query's own scores, keyed by query id in the order given.

    Args:
        k: The depth at which everything was cut off.
        ndcg, recall, mrr: See the module's definitions.
        per_query: One `QueryResult` per query id.
        seconds: Wall clock of encoding and scoring.
        queries, documents: How many there were.
    """

    k: int
    ndcg: Metric
    recall: Metric
    mrr: Metric
    per_query: dict[str, QueryResult]
    seconds: float
    queries: int
    documents: int

    def metrics(self) -> dict[str, float]:
        """The means: `{"ndcg@10": …, "recall@10": …, "mrr@10": …}` for k = 10."""
        return {f"{name}@{self.k}": self._metric(name).mean for name in NAMES}

    def as_json(self) -> dict[str, Any]:
        """The means, `intervals` (`{"ndcg@10": [low, high], …}`) and the counts, ready for `json.dumps`."""
        intervals = {f"{name}@{self.k}": [self._metric(name).low, self._metric(name).high] for name in NAMES}
        return {**self.metrics(), "intervals": intervals, "queries": self.queries, "documents": self.documents}

    def _metric(self, name: str) -> Metric:
        metric: Metric = getattr(self, name)
        return metric


def _check(
    queries: Mapping[str, str], corpus: Mapping[str, str], relevant: Mapping[str, set[str]], numbers: Mapping[str, int]
) -> None:
    """Refuse what cannot be scored, naming the first id at fault."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}", where="evaluate_retrieval", fix=f"Give {name} of at least 1.")
    if not queries or not corpus:
        raise DataError(f"no {'document' if queries else 'query'} to evaluate", fix="Give at least one.")
    for kind, texts in (("query", queries), ("document", corpus)):
        for key, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"the text is a {type(text).__name__}", where=f"{kind} {key!r}", fix="Give a string.")
    for query in relevant:
        if query not in queries:
            raise DataError("has relevant documents but no text", where=f"query {query!r}", fix="Add it, or drop it.")
    for query in queries:
        if not relevant.get(query):
            raise DataError("no relevant document", where=f"query {query!r}", fix="Name one, or leave the query out.")
        for document in sorted(relevant[query]):
            if document not in corpus:
                raise DataError(
                    f"relevant document {document!r} is not in the corpus",
                    where=f"query {query!r}",
                    fix="Add it to the corpus, or drop it from the relevant ones.",
                )


def _top(scores: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The first k columns of each row, by descending score, then by ascending column.

    `topk` picks among equals as it likes, so rows with a tie at the k-th place are sorted in full; others, the
    rule, cost no sort of the whole corpus.
    """
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    tied = ((scores >= values[:, -1:]).sum(dim=1) > k).nonzero()[:, 0]
    if len(tied):
        ordered, positions = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered[:, :k], positions[:, :k]
    rows = zip(columns.tolist(), values.tolist(), strict=True)
    return [sorted(zip(*row, strict=True), key=lambda hit: (-hit[1], hit[0])) for row in rows]


def _first_relevant(scores: Tensor, relevant: list[list[int]]) -> list[tuple[int, int]]:
    """Per row the rank (from 1) and the column of its best relevant document, in the order of `_top`."""
    import torch

    rows = [row for row, columns in enumerate(relevant) for _ in columns]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask[rows, [column for columns in relevant for column in columns]] = True
    best = scores.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    first = (equal & mask).to(torch.uint8).argmax(dim=1, keepdim=True)
    earlier = equal & (torch.arange(scores.shape[1], device=scores.device) < first)
    ranks = 1 + ((scores > best) | earlier).sum(dim=1)
    return list(zip(ranks.tolist(), first[:, 0].tolist(), strict=True))


def ndcg(hits: Sequence[int], relevant: int, k: int) -> float:
    """Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002) of documents that are relevant or not.

    Args:
        hits: Ranks, from 1 to at most `k`, of those that are.
        relevant: How many there are.
        k: The depth.
    """
    ideal = sum(1 / np.log2(place + 1) for place in range(1, min(k, relevant) + 1))
    return float(sum(1 / np.log2(place + 1) for place in hits) / ideal)


def _judge(top: Sequence[tuple[str, float]], relevant: set[str], k: int, rank: int, best: str) -> QueryResult:
    hits = [place for place, (document, _) in enumerate(top, start=1) if document in relevant]
    return QueryResult(
        ndcg=ndcg(hits, len(relevant), k),
        recall=len(hits) / len(relevant),
        mrr=1 / hits[0] if hits else 0.0,
        top=tuple(top),
        rank=rank,
        best=best,
    )


def _score(
    query_vectors: Tensor, document_vectors: Tensor, similarity: Any, relevant: list[list[int]], k: int
) -> Iterator[tuple[list[tuple[int, float]], tuple[int, int]]]:
    """Yield per query its top k (column, score) and its first relevant document (rank, column)."""
    step = max(1, BLOCK // len(document_vectors))
    for start in range(0, len(query_vectors), step):
        scores = similarity(query_vectors[start : start + step], document_vectors)
        if not scores.isfinite().all():
            raise ModelError(
                "the model's scores are not finite",
                where=f"evaluation, queries {start} to {start + len(scores) - 1}",
                fix="The training diverged or the dtype overflows: lower the learning rate, or use float32.",
            )
        yield from zip(_top(scores, k), _first_relevant(scores, relevant[start : start + step]), strict=True)


def bootstrap(values: NDArray[np.float64], *, seed: int, resamples: int) -> list[Metric]:
    """Means of the columns of `values` (queries x metrics) with 95% percentile intervals over the rows.

    One resample at a time: 1000 of 100,000 queries would otherwise be an index of 800 MB.
    """
    generator = np.random.default_rng(seed)
    count = len(values)
    means = np.stack([values[generator.integers(count, size=count)].mean(axis=0) for _ in range(resamples)])
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    columns = zip(values.mean(axis=0), low, high, strict=True)
    return [Metric(mean=float(mean), low=float(least), high=float(most)) for mean, least, most in columns]


def _table(per_query: Mapping[str, QueryResult]) -> NDArray[np.float64]:
    return np.array([(one.ndcg, one.recall, one.mrr) for one in per_query.values()], dtype=np.float64)


def evaluate_retrieval(
    model: SentenceTransformer,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    relevant: Mapping[str, set[str]],
    *,
    k: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
    progress: bool = False,
) -> RetrievalResult:
    """Rank the whole corpus for every query by the model's own similarity and score the ranking.

    Queries go through `encode_query` and documents through `encode_document`, so the model's prompts apply. The
    model is left in eval mode, as its own `encode` leaves it. Memory beyond the embeddings stays under a few times
    64 MiB.

    Args:
        model: A `SentenceTransformer`, or anything with `encode_query`, `encode_document` and `similarity`.
        queries: Text by query id.
        corpus: Text by document id.
        relevant: The ids of the relevant documents by query id: at least one for every query.
        k: Cut-off of all three metrics, at least 1.
        batch_size: Texts per forward pass.
        seed: Seed of the bootstrap; the same seed gives the same intervals.
        resamples: Bootstrap resamples.
        progress: Show Sentence Transformers' own bars while encoding.

    Raises:
        DataError: No query or document, a text that is not a string, or ids in one mapping that another lacks.
        ConfigError: `k`, `batch_size` or `resamples` below 1.
        ModelError: Scores that are not finite.
    """
    _check(queries, corpus, relevant, {"k": k, "batch_size": batch_size, "resamples": resamples})
    began = time.perf_counter()
    documents = sorted(corpus)  # so that the lower column is the lower id, whatever order the caller had
    column = {document: place for place, document in enumerate(documents)}
    wanted = [sorted(column[document] for document in relevant[query]) for query in queries]
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": progress, "convert_to_tensor": True}
    query_vectors = model.encode_query(list(queries.values()), **options)
    document_vectors = model.encode_document([corpus[document] for document in documents], **options)
    rows = _score(query_vectors, document_vectors, model.similarity, wanted, k)
    per_query = {
        query: _judge([(documents[at], score) for at, score in top], relevant[query], k, rank, documents[best])
        for query, (top, (rank, best)) in zip(queries, rows, strict=True)
    }
    seconds = time.perf_counter() - began
    ndcg, recall, mrr = bootstrap(_table(per_query), seed=seed, resamples=resamples)
    return RetrievalResult(
        k=k,
        ndcg=ndcg,
        recall=recall,
        mrr=mrr,
        per_query=per_query,
        seconds=seconds,
        queries=len(queries),
        documents=len(corpus),
    )


def paired_gain(
    before: RetrievalResult, after: RetrievalResult, *, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """The change from `before` to `after` on the same queries, with 95% intervals of the difference.

    Resampling the differences query by query is the sharper test: the two intervals of the means may overlap
    where nearly every query improved.

    Returns:
        `{"ndcg@10": after - before, …, "intervals": {"ndcg@10": [low, high], …}, "improved": n, "worsened": n,
        "unchanged": n}`, the counts by each query's nDCG.

    Raises:
        DataError: The two were measured on other queries or with another k.
    """
    if before.k != after.k or before.per_query.keys() != after.per_query.keys():
        raise DataError(
            "the two results are not of the same queries at the same k",
            where="paired_gain",
            fix="Evaluate both models with the same queries and k.",
        )
    aligned = {query: after.per_query[query] for query in before.per_query}
    change = _table(aligned) - _table(before.per_query)
    metrics = dict(zip(NAMES, bootstrap(change, seed=seed, resamples=resamples), strict=True))
    return {
        **{f"{name}@{before.k}": metric.mean for name, metric in metrics.items()},
        "intervals": {f"{name}@{before.k}": [metric.low, metric.high] for name, metric in metrics.items()},
        "improved": int((change[:, 0] > 0).sum()),
        "worsened": int((change[:, 0] < 0).sum()),
        "unchanged": int((change[:, 0] == 0).sum()),
    }
