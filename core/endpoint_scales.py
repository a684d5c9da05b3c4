"""What a server may do to a model's numbers that leaves their meaning: it is undone before they are compared.

It may give every vector the length 1, or probabilities in place of logits. The APIs do not say which; the numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Table: TypeAlias = "NDArray[np.float64]"

# A float32 next to 1 tells probabilities apart by 6e-8, which at this logit is one in a hundred of it.
_FAR = 11.5
# Halves are rounded by 5e-4.
_UNIT = 2e-3


def unit(rows: Table) -> bool:
    """Whether all vectors are of length 1, as well as halves can say it."""
    return bool((np.abs(np.linalg.norm(rows, axis=1) - 1) < _UNIT).all())


def comparable(
    reference: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The golden values and the answers as they can be compared, without inputs that were refused, and what was done.

    Args:
        reference: What `golden.json` holds.
        answer: Of `endpoints.answers`.
    """
    places = [place for place, row in enumerate(answer["outputs"]) if row is not None]
    columns = {key for key in ("inputs", "prompts", "texts", "token_ids", "outputs") if reference.get(key) is not None}
    kept = {**reference, **{key: [reference[key][place] for place in places] for key in columns}}
    ours = np.asarray([row if isinstance(row, list) else [row] for row in kept["outputs"]], dtype=np.float64)
    theirs = np.asarray([answer["outputs"][place] for place in places], dtype=np.float64)
    notes: list[str] = []
    if places and ours.shape == theirs.shape:
        undo = _directions if reference["kind"] == "embeddings" else _logits
        ours, theirs, notes = undo(ours, theirs)
    return {**kept, "outputs": ours.tolist()}, {**answer, "outputs": theirs.tolist()}, notes


def _directions(ours: Table, theirs: Table) -> tuple[Table, Table, list[str]]:
    if unit(ours) or not unit(theirs):
        return ours, theirs, []
    lengths = np.maximum(np.linalg.norm(ours, axis=1, keepdims=True), 1e-300)
    return ours / lengths, theirs, ["it gives vectors of length 1, which the model does not: directions are compared"]


def _logits(ours: Table, theirs: Table) -> tuple[Table, Table, list[str]]:
    """Answers that are nearest to the golden logits as probabilities are taken for such."""
    found = {"": (ours, theirs)}
    if theirs.min() >= 0 and theirs.max() <= 1:
        found["sigmoids"] = np.clip(ours, -_FAR, _FAR), _clipped(lambda p: np.log(p) - np.log1p(-p), theirs)
        if theirs.shape[1] > 1:
            found["softmaxes"] = _centred(ours), _centred(_clipped(np.log, theirs))
    best = min(found, key=lambda scale: float(np.abs(found[scale][0] - found[scale][1]).max()))
    notes = [f"its scores are the {best} of logits: those are compared"] if best else []
    return *found[best], notes


def _clipped(function: Callable[[Table], Table], probabilities: Table) -> Table:
    least = 1 / (1 + np.exp(_FAR))
    return function(np.clip(probabilities, least, 1 - least))


def _centred(rows: Table) -> Table:
    centred: Table = rows - rows.mean(axis=1, keepdims=True)
    return centred
