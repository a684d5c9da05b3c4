"""Training rows for rerankers out of a first stage's candidates: pairs, lists, triplets, with hard negatives.

Where an embedding model finds the negatives, Sentence Transformers' `mine_hard_negatives` does all of it. This is for
candidates that are there already, as BM25's; words for formats and margins are that function's. A document that is
known to be relevant is never a negative, not under another id with the same text either, nor to a query with the same
words. A teacher's scores may also throw out what looks relevant and is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from .errors import ConfigError, DataError
from .reranking import RerankingData
from .runs import say as _say
from .teacher_scores import score_column

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

Format: TypeAlias = Literal["labeled-pair", "labeled-list", "triplet", "n-tuple"]
FORMATS: tuple[Format, ...] = ("labeled-pair", "labeled-list", "triplet", "n-tuple")


@dataclass(frozen=True, slots=True)
class _Group:
    """One query's positives and chosen negatives, (text, teacher's score) each; nan without a teacher."""

    query: str
    positives: list[tuple[str, float]]
    negatives: list[tuple[str, float]]


def with_hard_negatives(
    data: RerankingData,
    *,
    output_format: Format = "labeled-pair",
    num_negatives: int = 7,
    sampling_strategy: Literal["top", "random"] = "top",
    range_min: int = 0,
    teacher: Any = None,
    teacher_options: dict[str, Any] | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    max_score: float | None = None,
    output_scores: bool = False,
    seed: int = 42,
    say: Callable[[str], None] = _say,
) -> datasets.Dataset:
    """Rows for a loss of cross-encoders: every known positive, and negatives from the candidates.

    Args:
        data: Queries, candidates and which of the corpus are relevant. Queries without a known positive are left out.
        output_format: "labeled-pair": query, document, label (BinaryCrossEntropyLoss, MSELoss with scores).
            "labeled-list": query, documents, labels (LambdaLoss, ListNetLoss, RankNetLoss, …). "triplet": query,
            positive, negative. "n-tuple": query, positive, negative_1, …; queries with fewer negatives are left out
            (MultipleNegativesRankingLoss, MarginMSELoss with scores).
        num_negatives: Negatives of a query, at most; at least 1.
        sampling_strategy: "top": the candidates that the first stage put first. "random": any of them.
        range_min: Pass over so many candidates at the top, where unjudged documents are relevant most often.
        teacher: What `teacher_scores` takes: for the three filters below and for `output_scores`.
        teacher_options: Of `score_column`: `identity`, `prompt`, `raw`, `batch_size`, `load`, `folder`.
        absolute_margin: A negative's score is at least so much under the query's worst positive's.
        relative_margin: The same, as a share of that score's size.
        max_score: A negative's score is at most this.
        output_scores: Teacher's scores as labels: a score for each document, for tuples positive minus negative.
        seed: Of "random"; a query's draw depends on it and the query's place, nothing else.
        say: Told, in one line each, what was left out.

    Returns:
        A `datasets.Dataset`, in the order of the queries; the label is the last column, float32 where it is a score.

    Raises:
        ConfigError: Options that contradict each other.
        DataError: Nothing is left to train on.
        ModelError: The teacher's scores are not finite.
    """
    from datasets import Dataset

    filters = [margin for margin in (absolute_margin, relative_margin, max_score) if margin is not None]
    _check(output_format, num_negatives, sampling_strategy, range_min, teacher, bool(filters) or output_scores)
    shared = _positives(data)
    queries = [query for query in data.queries if shared[data.queries[query]]]
    texts = {query: _texts(data, query, shared[data.queries[query]], range_min) for query in queries}
    scores: dict[str, dict[str, float]] = {}
    if teacher is not None:
        documents = [[*texts[query][0], *texts[query][1]] for query in queries]
        asked = Dataset.from_dict({"query": [data.queries[query] for query in queries], "documents": documents})
        flat = iter(score_column(asked, "query", "documents", teacher, say=say, **(teacher_options or {})).tolist())
        scores = {query: {one: next(flat) for one in each} for query, each in zip(queries, documents, strict=True)}
    groups, dropped = list[_Group](), 0
    for place, query in enumerate(queries):
        positives, candidates = texts[query]
        known = scores.get(query, {})
        kept = candidates
        if filters:
            bound = _bound(min(known[one] for one in positives), absolute_margin, relative_margin, max_score)
            kept = [one for one in candidates if known[one] <= bound]
            dropped += len(candidates) - len(kept)
        if sampling_strategy == "random":
            drawn = np.random.default_rng([seed, place]).permutation(len(kept))[:num_negatives]
            kept = [kept[at] for at in sorted(drawn)]
        scored = [[(one, known.get(one, math.nan)) for one in each] for each in (positives, kept[:num_negatives])]
        groups.append(_Group(data.queries[query], *scored))
    whole = [group for group in groups if len(group.negatives) >= (num_negatives if output_format == "n-tuple" else 1)]
    _tell(say, data, len(data.queries) - len(queries), len(groups) - len(whole), dropped)
    if not whole:
        fix = "Ask for fewer negatives, wider margins or more candidates"
        raise DataError("no query has a positive and enough negatives", where=data.name, fix=fix)
    rows = list(_rows(whole, output_format, output_scores=output_scores))
    return Dataset.from_dict(
        {name: [row[name] for row in rows] for name in rows[0]}, features=_features(rows[0], scores=output_scores)
    )


def _check(
    output_format: str, num_negatives: int, strategy: str, range_min: int, teacher: Any, needs_teacher: bool
) -> None:
    if output_format not in FORMATS:
        raise ConfigError(f"'{output_format}' is no format", where="output_format", fix=f"Use {', '.join(FORMATS)}")
    if strategy not in ("top", "random"):
        raise ConfigError(f"'{strategy}' is no way to choose", where="sampling_strategy", fix="Use top or random")
    if num_negatives < 1:
        raise ConfigError(f"{num_negatives} negatives are none", where="num_negatives", fix="Use 1 or more")
    if range_min < 0:
        raise ConfigError(f"{range_min} candidates cannot be passed over", where="range_min", fix="Use 0 or more")
    if needs_teacher and teacher is None:
        what = "margins, max_score and output_scores are about a teacher's scores, and there is no teacher"
        raise ConfigError(what, where="teacher", fix="Pass a teacher, or leave them out")
    if teacher is not None and not needs_teacher:
        fix = "Pass absolute_margin, relative_margin, max_score or output_scores, or drop it"
        raise ConfigError("nothing is asked of the teacher", where="teacher", fix=fix)


def _positives(data: RerankingData) -> dict[str, dict[str, None]]:
    """{query text: texts relevant to any query of this text, in a fixed order}."""
    found: dict[str, dict[str, None]] = {text: {} for text in data.queries.values()}
    for query, text in data.queries.items():
        found[text].update((data.corpus[one], None) for one in sorted(data.relevant[query]))
    return found


def _texts(data: RerankingData, query: str, relevant: dict[str, None], skip: int) -> tuple[list[str], list[str]]:
    """The texts of a query's own positives, and of its candidates that are no positive, each once."""
    own = list(dict.fromkeys(data.corpus[one] for one in sorted(data.relevant[query]))) or list(relevant)
    candidates = dict.fromkeys(data.corpus[one] for one in data.candidates[query][skip:])
    return own, [text for text in candidates if text not in relevant]


def _bound(worst: float, absolute: float | None, relative: float | None, most: float | None) -> float:
    """The highest score of a negative, from that of the worst positive, as `mine_hard_negatives` has it."""
    bounds = [math.inf if most is None else most]
    if absolute is not None:
        bounds.append(worst - absolute)
    if relative is not None:
        bounds.append(worst - abs(worst) * relative)
    return min(bounds)


def _rows(groups: Sequence[_Group], output_format: Format, *, output_scores: bool) -> Iterator[dict[str, Any]]:
    for group in groups:
        judged = [
            *((text, score if output_scores else 1) for text, score in group.positives),
            *((text, score if output_scores else 0) for text, score in group.negatives),
        ]
        if output_format == "labeled-pair":
            for text, label in judged:
                yield {"query": group.query, "document": text, "label": label}
        elif output_format == "labeled-list":
            yield {
                "query": group.query,
                "documents": [text for text, _ in judged],
                "labels": [label for _, label in judged],
            }
        else:
            yield from _tuples(group, output_format, output_scores=output_scores)


def _tuples(group: _Group, output_format: Format, *, output_scores: bool) -> Iterator[dict[str, Any]]:
    for positive, best in group.positives:
        row: dict[str, Any] = {"query": group.query, "positive": positive}
        margins = [best - score for _, score in group.negatives]
        if output_format == "triplet":
            for (negative, _), margin in zip(group.negatives, margins, strict=True):
                yield {**row, "negative": negative, **({"label": margin} if output_scores else {})}
        else:
            row |= {f"negative_{number}": text for number, (text, _) in enumerate(group.negatives, start=1)}
            yield {**row, **({"label": margins} if output_scores else {})}


def _features(row: dict[str, Any], *, scores: bool) -> datasets.Features:
    from datasets import Features, List, Value

    number = Value("float32" if scores else "int64")
    kinds = {str: Value("string"), int: number, float: number}
    return Features(
        {
            name: List(kinds[type(value[0])]) if isinstance(value, list) else kinds[type(value)]
            for name, value in row.items()
        }
    )


def _tell(say: Callable[[str], None], data: RerankingData, unknown: int, short: int, dropped: int) -> None:
    parts = []
    if unknown:
        parts.append(f"{unknown:,} queries without a known relevant document")
    if short:
        parts.append(f"{short:,} queries with too few negatives")
    if dropped:
        parts.append(f"{dropped:,} candidates that the teacher scores too near a relevant document")
    if parts:
        say(f"{data.name}: left out {', '.join(parts)}")


__all__ = ["FORMATS", "Format", "with_hard_negatives"]
