"""What is said of a store's neighbours: right ones pass, and each way of being wrong is found."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from burnish.core.errors import ModelError
from burnish.core.neighbours import compare, similarities

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
Rows = list[list[list[float]]]


@pytest.fixture
def vectors() -> NDArray[np.float64]:
    """Of other lengths than 1, so that every similarity has its own order."""
    return np.random.default_rng(0).normal(size=(20, 6)) * np.linspace(1, 3, 20)[:, None]


def found(vectors: NDArray[np.float64], similarity: str) -> Rows:
    """What a store gives that is right."""
    table = similarities(vectors, similarity)
    return [[[float(place), float(row[place])] for place in np.argsort(-row, kind="stable")] for row in table]


def outputs(vectors: NDArray[np.float64]) -> list[list[float]]:
    rows: list[list[float]] = vectors.tolist()
    return rows


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_are_sentence_transformers_own(similarity: str, vectors: NDArray[np.float64]) -> None:
    from sentence_transformers.util import SimilarityFunction

    theirs = SimilarityFunction.to_similarity_fn(similarity)(vectors, vectors)
    assert np.allclose(similarities(vectors, similarity), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_what_is_right_passes_and_another_distance_does_not(similarity: str, vectors: NDArray[np.float64]) -> None:
    assert compare(outputs(vectors), similarity, found(vectors, similarity)) == (1.0, 0.0, [])
    for other in SIMILARITIES:
        if other != similarity:
            rank, difference, faults = compare(outputs(vectors), similarity, found(vectors, other))
            assert rank < 1 and difference > 0.1 and len(faults) == 2, other


def test_order_and_scores_are_two_things(vectors: NDArray[np.float64]) -> None:
    right = found(vectors, "dot")
    halved = [[[place, score / 2] for place, score in row] for row in right]
    assert compare(outputs(vectors), "dot", halved)[0] == 1.0
    assert "off by" in compare(outputs(vectors), "dot", halved)[2][0]
    swapped = [[row[1], row[0], *row[2:]] for row in right]
    rank, _, faults = compare(outputs(vectors), "dot", swapped)
    assert rank < 1 and faults == [f"the store has {1 - rank:.1%} of pairs of neighbours in another order"]


def test_what_cannot_be_told_apart_has_no_order() -> None:
    twins = np.array([[1.0, 0.0], [1.0, 1e-9], [0.0, 1.0]])
    rows = found(twins, "cosine")
    rows[0][0], rows[0][1] = rows[0][1], rows[0][0]
    assert compare(outputs(twins), "cosine", rows) == (1.0, 0.0, [])


@pytest.mark.parametrize("row", [[], [[0.0, 1.0]] * 20])
def test_what_is_not_found_is_said(row: list[list[float]], vectors: NDArray[np.float64]) -> None:
    rows = found(vectors, "dot")
    rows[3] = row
    rank, _, faults = compare(outputs(vectors), "dot", rows)
    assert rank == 0 and faults == [f"the store finds {len(row) // 20} of 20 vectors for input 3"]
    assert "19 of 20 inputs" in compare(outputs(vectors), "dot", found(vectors, "dot")[:19])[2][0]


def test_no_number_is_no_similarity(vectors: NDArray[np.float64]) -> None:
    rows = found(vectors, "dot")
    rows[0][0][1] = float("nan")
    assert "off by nan" in compare(outputs(vectors), "dot", rows)[2][0]


def test_an_unknown_similarity() -> None:
    with pytest.raises(ModelError, match="no store has the similarity 'hamming'"):
        similarities(np.eye(2), "hamming")
