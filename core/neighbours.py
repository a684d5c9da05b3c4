"""What a vector store finds, and what the golden vectors say: the same neighbours, in the same order, as near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the largest similarity. float32 moves one by 1e-7 of it, another distance or sign by as much as itself.
NEAR = 1e-4
# What the golden vectors tell apart by less than this part of the largest has no order.
TIE = 1e-5


def similarities(vectors: NDArray[np.float64], similarity: str) -> NDArray[np.float64]:
    """(N, N) similarities as Sentence Transformers has them: a distance is negative, so that more is nearer.

    Raises:
        ModelError: If the similarity is none of Sentence Transformers'.
    """
    if similarity == "cosine":
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    found: NDArray[np.float64]
    if similarity in ("cosine", "dot"):
        found = vectors @ vectors.T
    elif similarity in ("euclidean", "manhattan"):
        order = 2 if similarity == "euclidean" else 1
        found = -np.stack([np.linalg.norm(vectors - row, ord=order, axis=1) for row in vectors])
    else:
        raise ModelError(f"no store has the similarity {similarity!r}", fix="Use cosine, dot, euclidean or manhattan")
    return found


def compare(
    outputs: Sequence[Sequence[float]], similarity: str, neighbours: Sequence[Sequence[Sequence[float]]]
) -> tuple[float, float, list[str]]:
    """(share of pairs of neighbours in the right order, largest difference of a similarity, what is wrong by line).

    Args:
        outputs: The golden vectors.
        similarity: The model's, as in `deploy.json`.
        neighbours: For each vector, (place, similarity) of what the store found, nearest first; all, itself too.
    """
    wanted = similarities(np.asarray(outputs, dtype=np.float64), similarity)
    count, largest = len(wanted), float(np.abs(wanted).max(initial=1.0))
    places = [[int(place) for place, _ in row] for row in neighbours]
    if odd := [row for row, found in enumerate(places) if sorted(found) != list(range(count))]:
        found = len(set(places[odd[0]]))
        return 0.0, float("nan"), [f"the store finds {found} of {count} vectors for input {odd[0]}"]
    if len(places) != count:
        return 0.0, float("nan"), [f"the store answers for {len(places)} of {count} inputs"]
    given = np.asarray([[score for _, score in row] for row in neighbours], dtype=np.float64)
    sorted_wanted = np.take_along_axis(wanted, np.asarray(places), axis=1)
    faults = []
    off = float(np.abs(given - sorted_wanted).max())
    if not off <= NEAR * largest:
        faults.append(f"a {similarity} similarity of the store is off by {off:.2e}")
    rank = _ordered(sorted_wanted, TIE * largest)
    if rank < 1.0:
        faults.append(f"the store has {1 - rank:.1%} of pairs of neighbours in another order")
    return rank, off, faults


def _ordered(rows: NDArray[np.float64], tie: float) -> float:
    """Share of pairs in each row, of those that lie further apart than `tie`, of which the larger stands first."""
    first, second = np.triu_indices(rows.shape[1], 1)
    apart = rows[:, first] - rows[:, second]
    told = np.abs(apart) > tie
    return float((apart[told] > 0).mean()) if told.any() else 1.0
