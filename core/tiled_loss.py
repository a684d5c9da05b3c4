"""Sentence Transformers' losses with in-batch negatives on the operation `tiled_infonce` where a batch is large.

Bound to the instance, so that no class is touched and another run's loss is what it was; and taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor, nn

from .errors import PatchError

Operation: TypeAlias = Callable[..., Tensor]
"""`tiled_infonce`: queries, columns of documents and the loss's settings to the loss of each query."""

LEAST_SCORES = 2**22
"""From how many scores on a batch is tiled: 2048 x 2048, where both take as long. Forward and backward of the dense and
the tiled loss on one CPU core, D = 384: 94 and 103 ms for 1024 pairs, 328 and 290 for 2048, 1670 and 1010 for 4096;
D = 1024: 222 and 272, 718 and 751. The dense loss holds about five matrices of scores, 80 MiB at this size."""

_SIMILARITIES = {cos_sim: "cosine", dot_score: "dot"}
_SETTINGS = ("scale", "directions", "partition_mode", "hardness_mode", "hardness_strength")


@dataclass(slots=True)
class Undo:
    """What `tile` has bound; calling it takes that off again, once.

    Raises:
        PatchError: If something else has taken its place since. Nothing is taken off then.
    """

    bound: list[tuple[nn.Module, str, Callable[..., Tensor]]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are tiled, by class."""
        return tuple(type(module).__name__ for module, _, _ in self.bound)

    def __call__(self) -> None:
        """Leave every loss as it was."""
        for module, name, mine in self.bound:
            if vars(module).get(name) is not mine:
                what = f"its {name} is not what Burnish put there"
                raise PatchError(what, where=type(module).__name__, fix="Take off first what was put on last")
        for module, name, _ in self.bound:
            delattr(module, name)
        self.bound.clear()


def tile(loss: nn.Module, operation: Operation, least_scores: int = LEAST_SCORES) -> Undo:
    """Have `loss`, and losses inside it, compute large batches without a matrix of scores.

    That concerns MultipleNegativesRankingLoss, its symmetric form, and the cached form of both. Left alone are
    subclasses with a computation of their own, losses with another similarity than `cos_sim` or `dot_score`, and those
    on which the computation was bound before (MatryoshkaLoss does so to cached losses).

    Args:
        loss: The loss, or a module that holds losses.
        operation: An implementation of `tiled_infonce`.
        least_scores: A batch with fewer scores, those of all directions together, is computed as it was before, bit for
            bit.

    Returns:
        What undoes it, which knows what was bound.
    """
    undo = Undo()
    for module in loss.modules():
        found = _computation(module)
        if found is None or found[0] in vars(module) or _similarity(module) is None:
            continue
        name, replacement = found
        mine = partial(replacement, module, operation, least_scores)
        setattr(module, name, mine)
        undo.bound.append((module, name, mine))
    return undo


def _computation(module: nn.Module) -> tuple[str, Callable[..., Tensor]] | None:
    """The method of a loss that is replaced, and what replaces it; None where it has its own or is another loss."""
    known: tuple[tuple[type[nn.Module], str, Callable[..., Tensor]], ...] = (
        (MultipleNegativesRankingLoss, "compute_loss_from_embeddings", _rank),
        (CachedMultipleNegativesRankingLoss, "calculate_loss", _rank_cached),
    )
    for kind, name, replacement in known:
        if isinstance(module, kind) and getattr(type(module), name) is getattr(kind, name):
            return name, replacement
    return None


def _similarity(loss: Any) -> str | None:
    """The operation's name for the loss's similarity, None where it has none."""
    function = loss.similarity_fct
    return next((name for known, name in _SIMILARITIES.items() if function is known), None)


def _rank(
    loss: Any, operation: Operation, least: int, embeddings: Sequence[Tensor], labels: Tensor | None = None
) -> Tensor:
    """`compute_loss_from_embeddings` of MultipleNegativesRankingLoss."""
    if _stays_dense(loss, least, [[column] for column in embeddings]):
        stock: Tensor = type(loss).compute_loss_from_embeddings(loss, embeddings, labels)
        return stock
    return _tiled(loss, operation, embeddings)


def _rank_cached(
    loss: Any,
    operation: Operation,
    least: int,
    reps: Sequence[Sequence[Tensor]],
    labels: Tensor | None = None,
    *,
    with_backward: bool = False,
) -> Tensor:
    """`calculate_loss` of CachedMultipleNegativesRankingLoss: the columns come in mini-batches."""
    if _stays_dense(loss, least, reps):
        stock: Tensor = type(loss).calculate_loss(loss, reps, labels, with_backward=with_backward)
        return stock
    value = _tiled(loss, operation, [torch.cat(list(parts)) for parts in reps])
    if with_backward:
        torch.autograd.backward(value)
        return value.detach()
    return value


def _stays_dense(loss: Any, least: int, columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether this batch is for Sentence Transformers' own code, which also says what is wrong with a wrong one."""
    if len(columns) < 2 or _similarity(loss) is None:
        return True
    if any(part.layout != torch.strided for column in columns for part in column):
        return True
    rows = sum(len(part) for part in columns[0])
    world = torch.distributed.get_world_size() if loss.gather_across_devices and _distributed() else 1
    wide = len(columns) - 1  # in columns of as many texts as there are queries
    against = {"query_to_doc": wide, "query_to_query": 1, "doc_to_query": 1, "doc_to_doc": wide}
    return rows * rows * world * sum(against[direction] for direction in loss.directions) < least


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _tiled(loss: Any, operation: Operation, embeddings: Sequence[Tensor]) -> Tensor:
    """The mean loss of this process's queries, a float32 scalar (float64 for float64)."""
    rows, offset = embeddings[0].shape[0], 0
    if loss.gather_across_devices:  # everybody's texts, with gradients that flow back to where they came from
        embeddings = [all_gather_with_grad(column) for column in embeddings]
        offset = get_rank() * rows
    settings = {name: getattr(loss, name) for name in _SETTINGS}
    queries, *documents = embeddings
    losses = operation(queries, documents, similarity=_similarity(loss), offset=offset, rows=rows, **settings)
    return losses.mean()
