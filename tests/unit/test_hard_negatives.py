"""Rows for losses out of candidates: no relevant document is a negative, filters act, and a seed decides all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.hard_negatives import with_hard_negatives
from burnish.core.reranking import RerankingData

CORPUS = {"d0": "zero", "d1": "one", "d2": "two", "d3": "three", "d4": "four", "twin": "one"}
# The teacher's score of each text, for every query.
SCORES = {"zero": 0.1, "one": 2.0, "two": 1.9, "three": -1.0, "four": 0.5}


def data(**changed: Any) -> RerankingData:
    made: dict[str, Any] = {
        "name": "small",
        "queries": {"a": "which?", "b": "which?", "c": "lost", "d": "alone"},
        "corpus": CORPUS,
        "candidates": {"a": ("d0", "twin", "d2", "d3", "d4"), "b": ("d1", "d0"), "c": ("d0",), "d": ("d3",)},
        "relevant": {"a": frozenset({"d1"}), "b": frozenset({"d4"}), "c": frozenset(), "d": frozenset({"d3"})},
        "counts": {"a": 1, "b": 1, "c": 1, "d": 1},
    }
    return RerankingData(**{**made, **changed})


def mined(said: list[str] | None = None, **settings: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = with_hard_negatives(data(), say=(said or []).append, **settings).to_list()
    return rows


class Teacher:
    """Scores by text, counting what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, pairs: list[tuple[str, str]]) -> list[float]:
        self.asked += len(pairs)
        return [SCORES[document] for _, document in pairs]


def with_teacher(tmp_path: Path, **settings: Any) -> list[dict[str, Any]]:
    options = {"identity": "by text", "folder": tmp_path}
    return mined(teacher=Teacher(), teacher_options=options, **settings)


def test_labelled_pairs_in_the_order_of_the_candidates() -> None:
    rows = mined(num_negatives=2)
    # "twin" is d1's text, and "four" is relevant to the other query of the same words: neither is a negative.
    assert [(row["query"], row["document"], row["label"]) for row in rows] == [
        ("which?", "one", 1), ("which?", "zero", 0), ("which?", "two", 0), ("which?", "four", 1), ("which?", "zero", 0),
    ]  # fmt: skip


def test_no_relevant_document_is_ever_a_negative() -> None:
    for seed in range(5):
        for row in mined(num_negatives=5, sampling_strategy="random", seed=seed, output_format="triplet"):
            assert row["negative"] not in ("one", "four") and row["positive"] in ("one", "four")
    harmless = data(queries={"a": "which?", "b": "other?", "c": "lost", "d": "alone"})
    rows = with_hard_negatives(harmless, num_negatives=5, say=lambda line: None)
    assert {"query": "which?", "document": "four", "label": 0} in rows.to_list(), "the rule above guards nothing"


def test_lists_and_tuples() -> None:
    assert mined(output_format="labeled-list", num_negatives=2)[0] == {
        "query": "which?", "documents": ["one", "zero", "two"], "labels": [1, 0, 0],
    }  # fmt: skip
    said = list[str]()
    rows = with_hard_negatives(data(), output_format="n-tuple", num_negatives=2, say=said.append)
    assert rows.column_names == ["query", "positive", "negative_1", "negative_2"] and len(rows) == 1
    assert said == [
        "small: left out 1 queries without a known relevant document, 2 queries with too few negatives"
    ]  # fmt: skip


def test_candidates_at_the_top_are_passed_over() -> None:
    assert [row["negative"] for row in mined(output_format="triplet", range_min=3)] == ["three"]


def test_a_seed_decides_the_draw_and_a_query_draws_for_itself() -> None:
    draw: dict[str, Any] = {"num_negatives": 1, "sampling_strategy": "random"}
    assert mined(seed=3, **draw) == mined(seed=3, **draw)
    assert len({str(mined(seed=seed, **draw)) for seed in range(8)}) > 1
    less = data(candidates={**data().candidates, "b": ("d0", "d2", "d3")})
    ours, whole = (with_hard_negatives(one, seed=3, say=lambda line: None, **draw).to_list() for one in (less, data()))
    assert ours[:2] == whole[:2], "the draw of one query depends on another's candidates"


def test_a_teacher_throws_out_what_looks_relevant(tmp_path: Path) -> None:
    kept = {row["document"] for row in with_teacher(tmp_path, absolute_margin=0.2) if row["label"] == 0}
    assert kept == {"zero", "three"}, "two is 0.1 under the positive"
    for margin, wanted in ((0.04, {"zero", "two", "three"}), (0.06, {"zero", "three"})):  # two is 5% under it
        kept = {row["document"] for row in with_teacher(tmp_path, relative_margin=margin) if row["label"] == 0}
        assert kept == wanted
    kept = {row["document"] for row in with_teacher(tmp_path, max_score=0.0) if row["label"] == 0}
    assert kept == {"three"}


def test_scores_take_the_labels_place(tmp_path: Path) -> None:
    pairs = with_teacher(tmp_path, output_scores=True, num_negatives=1)
    assert [round(row["label"], 4) for row in pairs] == [2.0, 0.1, 0.5, 0.1]
    triplets = with_teacher(tmp_path, output_scores=True, num_negatives=1, output_format="triplet")
    assert [round(row["label"], 4) for row in triplets] == [1.9, 0.4]
    tuples = with_teacher(tmp_path, output_scores=True, num_negatives=2, output_format="n-tuple")
    assert [round(one, 4) for one in tuples[0]["label"]] == [1.9, 0.1]
    lists = with_teacher(tmp_path, output_scores=True, num_negatives=2, output_format="labeled-list")
    assert [round(one, 4) for one in lists[0]["labels"]] == [2.0, 0.1, 1.9]


def test_a_teacher_is_asked_once(tmp_path: Path) -> None:
    options = {"identity": "by text", "folder": tmp_path}
    counts = []
    for margin in (0.2, 0.5):
        teacher = Teacher()
        mined(teacher=teacher, teacher_options=options, absolute_margin=margin)
        counts.append(teacher.asked)
    assert counts[0] > 0 and counts[1] == 0


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"output_format": "pairs"}, "output_format: 'pairs' is no format"),
        ({"sampling_strategy": "best"}, "sampling_strategy"),
        ({"num_negatives": 0}, "num_negatives: 0 negatives are none"),
        ({"range_min": -1}, "range_min"),
        ({"absolute_margin": 0.1}, "there is no teacher"),
        ({"output_scores": True}, "there is no teacher"),
        ({"teacher": len}, "nothing is asked of the teacher"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        mined(**settings)


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no query has a positive and enough negatives"):
        mined(output_format="n-tuple", num_negatives=9)
