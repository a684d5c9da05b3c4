"""Which losses a run can train with, and on which columns: known before a weight is read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .columns import CLASSES, LABELLED_PAIRS, PAIRS, SCORED
from .errors import ConfigError

_IN_PYTHON = "Use it from Python, with burnish.Trainer, or pick another loss"


@dataclass(frozen=True, slots=True)
class _Needs:
    """The columns a loss reads: kinds as in `columns`, and for pairs how many texts."""

    kinds: tuple[str, ...]
    least: int = 2
    most: int | None = None

    def fit(self, kind: str, texts: int) -> bool:
        """Whether data of this kind with so many text columns has what the loss reads."""
        if kind not in self.kinds:
            return False
        return kind != PAIRS or (self.least <= texts and (self.most is None or texts <= self.most))

    def words(self) -> str:
        """The need as a sentence's object."""
        count = f"exactly {_NUMBER[self.most]}" if self.most == self.least else f"{_NUMBER[self.least]} or more"
        said = {
            PAIRS: f"{count} texts and no label",
            SCORED: "two texts and a score",
            LABELLED_PAIRS: "two texts and a label of 0 or 1",
            CLASSES: "one text and a label that is a whole number",
        }
        return ", or ".join(said[kind] for kind in self.kinds)


_NUMBER = {2: "two", 3: "three"}
_PER_CLASS = _Needs((CLASSES,))
_DEGREE = _Needs((SCORED, LABELLED_PAIRS))
# From the tables of inputs and labels in the docstrings of Sentence Transformers 6.0.1 and 6.2.0.
_NEEDS = {
    "MultipleNegativesRankingLoss": _Needs((PAIRS,)),
    "CachedMultipleNegativesRankingLoss": _Needs((PAIRS,)),
    "MultipleNegativesSymmetricRankingLoss": _Needs((PAIRS,), most=2),
    "CachedMultipleNegativesSymmetricRankingLoss": _Needs((PAIRS,), most=2),
    "MegaBatchMarginLoss": _Needs((PAIRS,), most=2),
    "TripletLoss": _Needs((PAIRS,), least=3, most=3),
    "CoSENTLoss": _DEGREE,
    "AnglELoss": _Needs((SCORED, LABELLED_PAIRS, PAIRS), least=3),
    "CosineSimilarityLoss": _DEGREE,
    "ContrastiveLoss": _Needs((LABELLED_PAIRS,)),
    "OnlineContrastiveLoss": _Needs((LABELLED_PAIRS,)),
    "BatchAllTripletLoss": _PER_CLASS,
    "BatchHardTripletLoss": _PER_CLASS,
    "BatchHardSoftMarginTripletLoss": _PER_CLASS,
    "BatchSemiHardTripletLoss": _PER_CLASS,
}
# Losses that can be made from a model alone, but whose labels or batches no column of a data set holds.
_OTHER_DATA = {
    "ContrastiveTensionLoss": "batches from its own data loader",
    "ContrastiveTensionLossInBatchNegatives": "single texts without labels",
    "DenoisingAutoEncoderLoss": "texts damaged by its own data set class",
    "DistillKLDivLoss": "a teacher's scores as labels",
    "EmbedDistillLoss": "a teacher's embeddings as labels",
    "GlobalOrthogonalRegularizationLoss": "another loss beside it",
    "MSELoss": "a teacher's embeddings as labels",
    "MarginMSELoss": "a teacher's margins as labels",
}


def find_loss(name: str) -> Any:
    """A loss class of Sentence Transformers by name.

    Raises:
        ConfigError: If there is none of that name, or it takes more than a model and columns.
    """
    from sentence_transformers.sentence_transformer import losses
    from torch import nn

    classes = {key: value for key, value in vars(losses).items() if inspect.isclass(value)}
    known = {key: value for key, value in classes.items() if issubclass(value, nn.Module)}
    if name not in known:
        trained = sorted(set(_NEEDS) & set(known))
        plain = {key.lower(): key for key in known}
        near = get_close_matches(name.lower(), plain, 1)
        fix = f"Did you mean {plain[near[0]]!r}?" if near else f"Known: {', '.join(trained)}"
        raise ConfigError(f"Sentence Transformers has no loss {name!r}", where="loss", fix=fix)
    if name in _OTHER_DATA:
        raise ConfigError(f"{name} needs {_OTHER_DATA[name]}", where="loss", fix=_IN_PYTHON)
    if needed := _beside_model(known[name]):
        raise ConfigError(f"{name} also needs {' and '.join(needed)}", where="loss", fix=_IN_PYTHON)
    return known[name]


def _beside_model(loss: type) -> list[str]:
    """What the loss's constructor demands beside the model, its first parameter."""
    parameters = list(inspect.signature(loss).parameters.values())[1:]
    demanded = (one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
    return [f"`{one.name}`" for one in demanded if one.default is one.empty]


def check_loss(name: str, kind: str, texts: int, where: str) -> None:
    """Refuse a loss that does not read what the data holds; a loss this file does not know is taken as it is.

    Args:
        name: The loss.
        kind: The data's kind, as `columns.Columns.kind`.
        texts: How many text columns it has.
        where: The data, as errors should call it.

    Raises:
        ConfigError: Naming what the loss needs and what there is.
    """
    needs = _NEEDS.get(name)
    if needs is None or needs.fit(kind, texts):
        return
    there = {
        PAIRS: f"{texts} texts and no label",
        SCORED: "two texts and a score",
        LABELLED_PAIRS: "two texts and a label of 0 or 1",
        CLASSES: "one text and a label",
    }[kind]
    fits = [loss for loss, need in _NEEDS.items() if need.fit(kind, texts)]
    fix = f"For these columns use {' or '.join(fits)}; or choose other columns with --columns ROLE=COLUMN"
    raise ConfigError(f"{name} needs {needs.words()}, and {where} has {there}", where="loss", fix=fix)
