"""Rows of a run to a batch: one stream of all columns, or each column's packed features.

The loader's data set yields row numbers, and the collator cuts the texts' tokens out of the token store; or it yields
rows that were tokenised ahead, where the data set is streamed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from . import stream
from .errors import DataError
from .tokenising import Recipe

Labels: TypeAlias = "NDArray[Any] | Sequence[Any] | None"

AHEAD = 1_024
"""Rows of a streamed data set that are tokenised at once."""


class Rows(Dataset[int]):
    """Row numbers of a data set, or of several one after another, in place of their texts."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> int:
        return row

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


@dataclass(slots=True, kw_only=True)
class Part:
    """One data set of a run.

    Args:
        columns: Tokens of each text column, in the loss's order.
        labels: One a row; None where there are none.
        prompt_lengths: Tokens of the prompt of each column that has one; pooling may leave them out.
        name: What the loss is looked up by where there are several; None if nothing is.
    """

    columns: Mapping[str, Any]
    labels: Labels = None
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    name: str | None = None


@dataclass(slots=True, kw_only=True)
class Tokenised:
    """A row of a streamed data set: the tokens of each of its columns, and its label."""

    columns: dict[str, stream.Tokens]
    label: Any = None


@dataclass(slots=True, kw_only=True)
class StreamCollator:
    """Rows of the token store to a batch.

    Args:
        parts: The data sets, whose rows are numbered one after another.
        joint: One stream of all columns; else each column's packed features under Sentence Transformers' names.
        position_offset: Of the family's packing.
        filler: Token id of the texts that fill a stream up.
        fit, fit_longest: Of `stream.flatten`; None where batches may have any shape.
        valid_label_columns: Which columns of a data set are labels, by name.
    """

    parts: list[Part]
    starts: list[int]
    joint: bool = True
    position_offset: int = 0
    filler: int = 0
    fit: stream.Fit | None = None
    fit_longest: stream.Fit | None = None
    valid_label_columns: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows of one data set, or of data sets with the same columns: row numbers, or `Tokenised` rows."""
        if not rows:
            return {}
        if isinstance(rows[0], Tokenised):
            part = self.parts[0]
            columns = [[row.columns[name] for row in rows] for name in part.columns]
            labels = None if rows[0].label is None else _tensor([row.label for row in rows])
            return self._batch(part, columns, labels)
        found = [bisect_right(self.starts, row) - 1 for row in (rows[0], rows[-1])]
        if len(rows) == 1 or (found[0] == found[1] and self._in_one(rows, found[0])):
            part, start = self.parts[found[0]], self.starts[found[0]]
            places = [row - start for row in rows]
            columns = [[column[place] for place in places] for column in part.columns.values()]
            return self._batch(part, columns, _labels(part.labels, places))
        return self._mixed(rows)

    def _in_one(self, rows: Sequence[int], number: int) -> bool:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else max(rows) + 1
        return self.starts[number] <= min(rows) and max(rows) < end

    def _mixed(self, rows: Sequence[int]) -> dict[str, Any]:
        """Rows of several data sets, as a sampler of the user's own may mix them."""
        numbers = [bisect_right(self.starts, row) - 1 for row in rows]
        parts = [self.parts[number] for number in numbers]
        places = [row - self.starts[number] for row, number in zip(rows, numbers, strict=True)]
        first = parts[0]
        if any(list(part.columns) != list(first.columns) for part in parts):
            fix = "Have the batch sampler keep to one data set, or give all of them the same columns"
            raise DataError("a batch mixes data sets with other columns", where="batch sampler", fix=fix)
        pairs = list(zip(parts, places, strict=True))
        columns = [[part.columns[name][place] for part, place in pairs] for name in first.columns]
        labels = None
        if first.labels is not None:
            labels = torch.cat([_labels(part.labels, [place]) for part, place in pairs])  # type: ignore[misc]
        return self._batch(first, columns, labels)

    def _batch(self, part: Part, columns: list[list[stream.Tokens]], labels: Tensor | None) -> dict[str, Any]:
        batch: dict[str, Any] = {} if part.name is None else {"dataset_name": part.name}
        if labels is not None:
            batch["label"] = labels
        settings: dict[str, Any] = {"position_offset": self.position_offset, "filler": self.filler}
        if self.joint:
            return batch | stream.flatten(columns, fit=self.fit, fit_longest=self.fit_longest, **settings)
        for name, texts in zip(part.columns, columns, strict=True):
            features = {**stream.model_inputs(stream.flatten([texts], **settings)), "modality": "text"}
            if name in part.prompt_lengths:
                features["prompt_length"] = part.prompt_lengths[name]
            batch |= {f"{name}_{key}": value for key, value in features.items()}
        return batch


def _tensor(labels: list[Any]) -> Tensor:
    return torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)


def _labels(labels: Labels, places: Sequence[int]) -> Tensor | None:
    if labels is None:
        return None
    return torch.from_numpy(labels[places]) if isinstance(labels, np.ndarray) else _tensor([labels[n] for n in places])


class StreamedRows(IterableDataset[Tokenised]):
    """The rows of a `datasets.IterableDataset`, `AHEAD` of them tokenised at a time."""

    def __init__(self, dataset: Any, recipes: Mapping[str, Recipe], label: str | None) -> None:
        self.dataset, self.recipes, self.label = dataset, dict(recipes), label

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as the data set does in this epoch."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tokenised]:
        rows = iter(self.dataset)
        while ahead := list(islice(rows, AHEAD)):
            columns = {}
            for name, recipe in self.recipes.items():
                values, lengths = recipe.tokenise([row[name] for row in ahead])
                columns[name] = np.split(values, np.cumsum(lengths)[:-1])
            for number, row in enumerate(ahead):
                texts = {name: found[number] for name, found in columns.items()}
                yield Tokenised(columns=texts, label=None if self.label is None else row[self.label])
