"""Reranking folders are checked as they are read, and orders are scored by hand-computed values."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core.errors import ConfigError, DataError, ModelError
from burnish.core.reranking import evaluate_reranking, load_reranking, with_candidates
from burnish.core.retrieval_data import RetrievalData

ROOT = Path(__file__).parents[2]
CORPUS = [{"_id": f"d{number}", "text": f"text {number}"} for number in range(4)]
ROWS: list[dict[str, Any]] = [
    {"query": "first", "doc_ids": ["d0", "d1", "d2"], "labels": [0, 0, 1], "n_relevant": 1},
    {"query": "second", "doc_ids": ["d2", "d3"], "labels": [1, 0], "n_relevant": 2},
    {"query": "nothing", "doc_ids": ["d0"], "labels": [0], "n_relevant": 0},
]


def folder(place: Path, rows: list[dict[str, Any]], corpus: list[dict[str, Any]] = CORPUS) -> Path:
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    with gzip.open(place / "test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return place


class Scorer:
    """A model whose scores are written down by pair."""

    def __init__(self, scores: dict[tuple[str, str], float]) -> None:
        self.scores, self.asked = scores, list[tuple[str, str]]()

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> Any:
        self.asked = list(pairs)
        return np.array([self.scores[pair] for pair in pairs], np.float32)


BEST_LAST = Scorer(
    {
        ("first", "text 0"): 0.5, ("first", "text 1"): 0.9, ("first", "text 2"): 0.7,
        ("second", "text 2"): 0.1, ("second", "text 3"): 0.2,
    }
)  # fmt: skip


def test_a_folder_is_read(tmp_path: Path) -> None:
    data = load_reranking(folder(tmp_path, ROWS), "test")
    assert data.queries == {"1": "first", "2": "second", "3": "nothing"}
    assert data.candidates["1"] == ("d0", "d1", "d2") and data.relevant["1"] == {"d2"}
    assert data.counts == {"1": 1, "2": 2, "3": 0} and data.name == f"{tmp_path.name}-test"
    assert list(load_reranking(tmp_path, "test", max_queries=1).queries) == ["1"]


def test_scores_are_those_of_the_definition(tmp_path: Path) -> None:
    data = load_reranking(folder(tmp_path, ROWS), "test")
    result = evaluate_reranking(BEST_LAST, data)
    two = 1 / math.log2(3)  # the gain at rank 2; the ideal of two relevant documents is 1 + this
    assert result.per_query["1"] == pytest.approx((two, 0.5))
    assert result.per_query["2"] == pytest.approx((two / (1 + two), 0.5)) and len(result.per_query) == 2
    assert result.ndcg.mean == pytest.approx((two + two / (1 + two)) / 2)
    assert result.ndcg.low <= result.ndcg.mean <= result.ndcg.high and result.ndcg.low < result.ndcg.high
    assert result.first == pytest.approx((0.5 + 1 / (1 + two)) / 2)  # ranks 3 and 1 as they came
    assert result.best == pytest.approx((1 + 1 / (1 + two)) / 2)  # one of the second's two is no candidate
    assert result.pairs == len(BEST_LAST.asked) == 5, "a query with nothing to find was scored"
    assert "as they came" in str(result)


def test_the_cut_off_counts(tmp_path: Path) -> None:
    data = load_reranking(folder(tmp_path, ROWS[:1]), "test")
    assert evaluate_reranking(BEST_LAST, data, k=1).ndcg.mean == 0 < evaluate_reranking(BEST_LAST, data, k=2).ndcg.mean


def test_equal_scores_rank_by_id(tmp_path: Path) -> None:
    rows = [{"query": "first", "doc_ids": ["d2", "d0"], "labels": [1, 0]}]
    data = load_reranking(folder(tmp_path, rows), "test")
    assert data.counts == {"1": 1}
    equal = Scorer({("first", "text 2"): 0.0, ("first", "text 0"): 0.0})
    assert evaluate_reranking(equal, data).per_query["1"][1] == 0.5


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"query": "q", "doc_ids": ["d9"], "labels": [1]}, "row 1: document 'd9' is unknown"),
        ({"query": "q", "doc_ids": ["d1", "d1"], "labels": [1, 0]}, "a candidate twice"),
        ({"query": "q", "doc_ids": [], "labels": []}, "column doc_ids: is no list of document ids"),
        ({"query": "q", "doc_ids": ["d1"], "labels": [1, 0]}, "column labels: is no list of 1 numbers"),
        ({"query": "q", "doc_ids": ["d1"], "labels": ["yes"]}, "column labels"),
        ({"query": "q", "doc_ids": ["d1"], "labels": [1], "n_relevant": 0}, "column n_relevant: 0 is not the number"),
        ({"query": "", "doc_ids": ["d1"], "labels": [1]}, "column query: cell is empty"),
        ({"doc_ids": ["d1"], "labels": [1]}, "row lacks the column"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=fault):
        load_reranking(folder(tmp_path, [row]), "test")


def test_a_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_reranking(tmp_path / "gone", "test")
    with pytest.raises(DataError, match="there is no such file"):
        load_reranking(folder(tmp_path, ROWS), "dev")
    with pytest.raises(DataError, match="occurs twice"):
        load_reranking(folder(tmp_path, [{**ROWS[0], "_id": "q"}, {**ROWS[1], "_id": "q"}]), "test")
    with pytest.raises(DataError, match="no query has a relevant document"):
        evaluate_reranking(BEST_LAST, load_reranking(folder(tmp_path, ROWS[2:]), "test"))


def test_a_model_that_gives_no_order(tmp_path: Path) -> None:
    data = load_reranking(folder(tmp_path, ROWS[:1]), "test")

    class Two:
        def predict(self, pairs: Any, **_: Any) -> Any:
            return np.zeros((len(pairs), 2))

    with pytest.raises(ModelError, match=r"\(2,\) scores a pair"):
        evaluate_reranking(Two(), data)
    with pytest.raises(ModelError, match="not finite"):
        evaluate_reranking(Scorer({pair: math.nan for pair in BEST_LAST.scores}), data)
    with pytest.raises(ConfigError, match="k is 0"):
        evaluate_reranking(BEST_LAST, data, k=0)


def test_candidates_for_a_retrieval_folder() -> None:
    texts = {"d0": "text 0", "d1": "text 1"}
    retrieval = RetrievalData(name="r", queries={"q": "first"}, corpus=texts, relevant={"q": {"d1"}})
    data = with_candidates(retrieval, {"q": ["d0"]})
    assert data.candidates == {"q": ("d0",)} and data.relevant == {"q": {"d1"}} and data.counts == {"q": 1}
    wrong: list[tuple[dict[str, list[str]], str]] = [
        ({}, "no candidates"),
        ({"q": ["d7"]}, "unknown"),
        ({"q": ["d0"], "p": ["d0"]}, "no text"),
    ]
    for candidates, fault in wrong:
        with pytest.raises(DataError, match=fault):
            with_candidates(retrieval, candidates)


def test_the_shipped_folder_is_the_known_one() -> None:
    """Its data sheet, made by other code, says of the first 300 test queries: as BM25 has them 0.412, at best 0.715."""

    class AsItComes:
        def predict(self, pairs: Any, **_: Any) -> Any:
            return -np.arange(len(pairs), dtype=np.float64)

    data = load_reranking(ROOT / "docs" / "examples" / "data" / "attack_rerank", "test", max_queries=300)
    result = evaluate_reranking(AsItComes(), data)
    assert round(result.ndcg.mean, 3) == round(result.first, 3) == 0.412 and round(result.best, 3) == 0.715
