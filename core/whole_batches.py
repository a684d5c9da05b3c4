"""Sentence Transformers' losses for cross-encoders with one forward a step, where they take several and say no number.

Its listwise losses forward `batch_size` pairs at a time unless they are told a `mini_batch_size`, and those with
negatives a column of candidates at a time. All forwards' graphs are held until the backward, so that one forward of all
pairs holds no more, and has fewer kernels to launch. Bound to the instance, and taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers.cross_encoder.losses import MarginMSELoss, MultipleNegativesRankingLoss
from torch import Tensor, nn

from .tiled_loss import Undo

_LOSSES = "sentence_transformers.cross_encoder.losses"


def join(loss: nn.Module, say: Callable[[str], None]) -> Callable[[], None]:
    """Have a loss, and losses inside it, forward all pairs of a batch at once where nobody said how many.

    A loss of another class, or a subclass that computes for itself, is left as it is, and so is a `mini_batch_size`.

    Args:
        loss: The loss.
        say: Told, in one line each, which forwards became one.

    Returns:
        Leaves every loss as it was.
    """
    bound, sized = Undo(), list[Any]()
    for one in loss.modules():
        name = type(one).__name__
        if _is_listwise(one):
            unsized: Any = one
            unsized.mini_batch_size = -1
            sized.append(one)
            at_a_time = "not batch_size at a time (an explicit mini_batch_size is kept)"
        elif _computes(one, MultipleNegativesRankingLoss, "call_model_with_columns", "calculate_loss"):
            _bind(bound, one, "call_model_with_columns", _Waiting.of)
            _bind(bound, one, "calculate_loss", partial(_calculate, one))
            at_a_time = "not a column at a time"
        elif _computes(one, MarginMSELoss, "logits_from_pairs"):
            _bind(bound, one, "forward", partial(_margin, one))
            at_a_time = "not a column at a time"
        else:
            continue
        say(f"{name}: all pairs of a batch go through the model at once, {at_a_time}; the numbers are the same")

    def undo() -> None:
        bound()
        for one in sized:
            one.mini_batch_size = None

    return undo


def _is_listwise(loss: Any) -> bool:
    known = any(kind.__module__.startswith(_LOSSES) for kind in type(loss).__mro__)
    return known and getattr(loss, "mini_batch_size", -1) is None


def _computes(loss: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether a loss computes by `kind`'s own forward and methods."""
    names = ("forward", *methods)
    own = isinstance(loss, kind) and not any(name in vars(loss) for name in names)
    return own and all(getattr(type(loss), name) is getattr(kind, name) for name in names)


def _bind(bound: Undo, loss: nn.Module, name: str, mine: Callable[..., Any]) -> None:
    setattr(loss, name, mine)
    bound.bound.append((loss, name, mine))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Pairs whose scores nobody has asked for yet."""

    pairs: list[tuple[str, str]]
    prompt: str | None
    task: str | None

    @classmethod
    def of(
        cls, anchors: Sequence[str], candidates: Sequence[str], prompt: str | None = None, task: str | None = None
    ) -> _Waiting:
        return cls(list(zip(anchors, candidates, strict=False)), prompt, task)


def _calculate(loss: Any, waiting: list[_Waiting], batch_size: int) -> Tensor:
    """The loss of columns of pairs, scored by one forward."""
    pairs = [pair for column in waiting for pair in column.pairs]
    scores = loss.call_model_with_pairs(pairs, prompt=waiting[0].prompt, task=waiting[0].task)
    columns: Any = list(torch.split(scores, [len(column.pairs) for column in waiting]))
    value: Tensor = MultipleNegativesRankingLoss.calculate_loss(loss, columns, batch_size)
    return value


def _margin(loss: Any, inputs: list[list[str]], labels: Any, prompt: str | None = None, task: str | None = None) -> Any:
    """`MarginMSELoss.forward`, which asks for the scores of its columns in their order, with all of them scored."""
    anchors, *columns = inputs
    pairs = [pair for column in columns for pair in zip(anchors, column, strict=False)]
    scores = iter(torch.split(loss.logits_from_pairs(pairs, prompt=prompt, task=task), len(anchors)))
    loss.logits_from_pairs = lambda pairs, **_: next(scores)
    try:
        return MarginMSELoss.forward(loss, inputs, labels, prompt=prompt, task=task)
    finally:
        del loss.logits_from_pairs


__all__ = ["join"]
