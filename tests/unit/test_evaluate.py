"""Retrieval scores: equal to Sentence Transformers' evaluator, sure about ties, intervals and bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim

from burnish.core import evaluate
from burnish.core.errors import ConfigError, DataError, ModelError
from burnish.core.evaluate import RetrievalResult, evaluate_retrieval, paired_gain


class Vectors:
    """A model whose embeddings are looked up by text."""

    similarity_fn_name = "cosine"

    def __init__(self, table: Mapping[str, Sequence[float]], dtype: torch.dtype = torch.float32) -> None:
        self.table, self.dtype = table, dtype
        self.model_card_data = self

    def encode_query(self, texts: list[str], **_: Any) -> torch.Tensor:
        return torch.tensor([list(self.table[text]) for text in texts], dtype=self.dtype)

    encode_document = encode_query

    def similarity(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return cos_sim(left, right)

    def set_evaluation_metrics(self, *_: object) -> None:
        """What the evaluator of Sentence Transformers reports to a model's card."""


def run(
    table: Mapping[str, Sequence[float]],
    relevant: Mapping[str, set[str]],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> RetrievalResult:
    queries = {key: key for key in table if key.startswith("q")}
    corpus = {key: key for key in table if not key.startswith("q")}
    return evaluate_retrieval(cast(SentenceTransformer, Vectors(table, dtype)), queries, corpus, relevant, **options)


def random_case(
    queries: int = 60, documents: int = 90, *, duplicates: bool = False
) -> tuple[dict[str, Any], dict[str, set[str]]]:
    generator = np.random.default_rng(7)
    table = {f"q{i}": generator.normal(size=8) for i in range(queries)}
    # Twelve vectors shared by all documents make ties at nearly every cut-off.
    pool = generator.integers(-2, 3, size=(12, 8)) + 0.5
    for i in range(documents):
        table[f"d{i}"] = pool[i % 12] if duplicates else generator.normal(size=8)
    names = [f"d{i}" for i in range(documents)]
    relevant = {f"q{i}": set(generator.choice(names, size=1 + i % 13, replace=False).tolist()) for i in range(queries)}
    return table, relevant


@pytest.mark.parametrize("k", [1, 3, 10, 200])
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_sentence_transformers(k: int, duplicates: bool) -> None:
    table, relevant = random_case(duplicates=duplicates)
    queries = {key: key for key in table if key.startswith("q")}
    corpus = {key: key for key in table if key.startswith("d")}
    theirs = InformationRetrievalEvaluator(
        cast(Any, queries),
        cast(Any, corpus),
        relevant,
        ndcg_at_k=[k],
        mrr_at_k=[k],
        precision_recall_at_k=[k],
        write_csv=False,
    )(cast(SentenceTransformer, Vectors(table)))
    ours = run(table, relevant, k=k, resamples=2).metrics()
    assert list(ours) == [f"ndcg@{k}", f"recall@{k}", f"mrr@{k}"]
    for name, value in ours.items():
        assert value == pytest.approx(theirs[f"cosine_{name}"], abs=1e-9)
    assert 0 < ours[f"ndcg@{k}"] < 1, "a score of 0 or 1 would prove nothing"


def test_by_hand() -> None:
    """Two relevant at ranks 2 and 3 of 3: DCG 1/log2(3) + 1/log2(4), ideal 1 + 1/log2(3)."""
    table = {"q": (1.0, 0.0), "a": (1.0, 0.1), "b": (1.0, 0.5), "c": (1.0, 0.9)}
    result = run(table, {"q": {"b", "c"}}, k=10)
    one = result.per_query["q"]
    assert [document for document, _ in one.top] == ["a", "b", "c"]
    assert one.ndcg == pytest.approx((1 / np.log2(3) + 0.5) / (1 + 1 / np.log2(3)))
    assert (one.recall, one.mrr, one.rank, one.best) == (1.0, 0.5, 2, "b")
    assert run(table, {"q": {"c"}}, k=1).per_query["q"].mrr == 0.0
    assert run(table, {"q": {"c"}}, k=1).per_query["q"].rank == 3


def test_ties_rank_by_id_whatever_the_order() -> None:
    same = (1.0, 1.0)
    names = ["d", "b", "a", "c"]
    for order in (names, names[::-1]):
        result = run({"q": (1.0, 0.0)} | dict.fromkeys(order, same), {"q": {"c"}}, k=3)
        assert [document for document, _ in result.per_query["q"].top] == ["a", "b", "c"]
        assert result.per_query["q"].rank == 3


def test_rank_agrees_with_a_full_sort() -> None:
    table, relevant = random_case(duplicates=True)
    shallow, deep = run(table, relevant, k=5, resamples=1), run(table, relevant, k=90, resamples=1)
    for query, one in deep.per_query.items():
        documents = [document for document, _ in one.top]
        first = next(place for place, document in enumerate(documents, start=1) if document in relevant[query])
        found = shallow.per_query[query]
        assert (found.rank, found.best) == (first, documents[first - 1])
        assert [document for document, _ in found.top] == documents[:5]
    assert max(one.rank for one in deep.per_query.values()) > 5


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, relevant = random_case(duplicates=True)
    whole = run(table, relevant)
    seen: list[int] = []
    similarity = Vectors.similarity

    def counted(self: Vectors, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(left.shape[0] * right.shape[0])
        return similarity(self, left, right)

    monkeypatch.setattr(Vectors, "similarity", counted)
    monkeypatch.setattr(evaluate, "BLOCK", 1000)
    parts = run(table, relevant)
    assert parts.metrics() == whole.metrics()
    assert len(seen) == 6 and max(seen) <= 1000


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    """Sentence Transformers widens before it scores: in bfloat16 both scores would be 1.0 and the tie go to "a"."""
    table = {"q": (1.0, 0.0), "a": (1.0, 0.04), "b": (1.0, 0.02)}
    assert run(table, {"q": {"b"}}, dtype=torch.bfloat16).per_query["q"].rank == 1
    vectors = Vectors(table, torch.bfloat16).encode_query(["q", "a", "b"])
    in_half = torch.nn.functional.normalize(vectors[1:]) @ vectors[0]
    assert in_half[0] == in_half[1], "the case no longer ties in bfloat16"


def test_intervals_are_seeded_and_hold_the_mean() -> None:
    table, relevant = random_case()
    one, same, other = (run(table, relevant, seed=seed) for seed in (0, 0, 1))
    assert (one.ndcg, one.mrr) == (same.ndcg, same.mrr)
    assert one.ndcg != other.ndcg and one.ndcg.mean == other.ndcg.mean
    assert one.ndcg.low < one.ndcg.mean < one.ndcg.high
    values = [query.ndcg for query in one.per_query.values()]
    normal = 1.96 * float(np.std(values)) / len(values) ** 0.5
    assert (one.ndcg.high - one.ndcg.low) / 2 == pytest.approx(normal, rel=0.15)


def test_json_shape() -> None:
    table, relevant = random_case()
    value = json.loads(json.dumps(run(table, relevant, k=5).as_json()))
    assert set(value) == {"ndcg@5", "recall@5", "mrr@5", "intervals", "queries", "documents"}
    assert value["intervals"]["ndcg@5"][0] <= value["ndcg@5"] <= value["intervals"]["ndcg@5"][1]
    assert (value["queries"], value["documents"]) == (60, 90)


def test_paired_gain() -> None:
    table, relevant = random_case()
    before = run(table, relevant)
    # Half of the queries move onto one of their relevant documents.
    moved = {key: table[sorted(relevant[key])[0]] for key in list(relevant)[::2]}
    after = run({**table, **moved}, relevant)
    gain = paired_gain(before, after)
    assert gain["ndcg@10"] == pytest.approx(after.ndcg.mean - before.ndcg.mean, abs=1e-12)
    low, high = gain["intervals"]["ndcg@10"]
    assert 0 < low < gain["ndcg@10"] < high
    assert gain["unchanged"] >= 30 and gain["improved"] + gain["worsened"] + gain["unchanged"] == 60
    assert gain["improved"] > gain["worsened"] == 0
    nothing = paired_gain(before, before)
    assert nothing["ndcg@10"] == 0 and nothing["intervals"]["ndcg@10"] == [0, 0]
    assert json.loads(json.dumps(gain)) == gain


def test_paired_gain_refuses_other_queries() -> None:
    table, relevant = random_case()
    fewer = {key: value for key, value in table.items() if key != "q0"}
    without = {key: value for key, value in relevant.items() if key != "q0"}
    with pytest.raises(DataError, match="same queries"):
        paired_gain(run(table, relevant), run(fewer, without))
    with pytest.raises(DataError, match="same queries"):
        paired_gain(run(table, relevant, k=10), run(table, relevant, k=5))


GOOD: dict[str, Sequence[float]] = {"q": (1.0, 0.0), "a": (1.0, 0.1)}


@pytest.mark.parametrize(
    ("table", "relevant", "message"),
    [
        ({"a": (1.0,)}, {}, "no query to evaluate"),
        ({"q": (1.0,)}, {"q": {"a"}}, "no document to evaluate"),
        (GOOD, {}, "query 'q': no relevant document"),
        (GOOD, {"q": set[str]()}, "query 'q': no relevant document"),
        (GOOD, {"q": {"a"}, "q9": {"a"}}, "query 'q9': has relevant documents but no text"),
        (GOOD, {"q": {"a", "z"}}, "query 'q': relevant document 'z' is not in the corpus"),
    ],
)
def test_mismatches_are_named(
    table: Mapping[str, Sequence[float]], relevant: Mapping[str, set[str]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(table, relevant)
    assert "\n" not in str(caught.value) and caught.value.fix


def test_text_that_is_no_string() -> None:
    with pytest.raises(DataError, match="document 'a': the text is a NoneType"):
        evaluate_retrieval(
            cast(SentenceTransformer, Vectors(GOOD)), {"q": "q"}, cast(dict[str, str], {"a": None}), {"q": {"a"}}
        )


@pytest.mark.parametrize("name", ["k", "batch_size", "resamples"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        run(GOOD, {"q": {"a"}}, torch.float32, **{name: 0})


def test_scores_that_are_not_finite() -> None:
    with pytest.raises(ModelError, match="not finite"):
        run({"q": (float("nan"), 0.0), "a": (1.0, 0.1)}, {"q": {"a"}})
