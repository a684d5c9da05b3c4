"""Pairs tokenised whole, once: for models that have a way of their own with them, such as a chat template.

What stands in one row makes pairs: its first text with each of the others. They are in the store as the model's own
preprocessing makes them, whatever that does. Pairs across rows, as in-batch negatives are, are not known before.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .token_store import is_list
from .tokenising import Flat, Recipe


class WholeRecipe(Recipe):
    """How pairs, each joined by `joined`, become token ids: by the model's own preprocessing and in no other way."""

    @cached_property
    def key(self) -> str:
        """A hash over everything that decides the token ids, beside the pairs."""
        own: Any = Recipe.key
        return f"{own.func(self)} pairs {getattr(self.tokenizer, 'chat_template', None)!r}"

    @cached_property
    def backend(self) -> Any:
        """None: the tokenizer alone does not know what the model does with pairs."""
        return None

    def _own(self, texts: list[str]) -> Flat:
        features = self.model.preprocess([_apart(text) for text in texts], prompt=self.prompt or None)
        bounds = features["cu_seq_lens_q"].numpy().astype(np.int64)
        return features["input_ids"][0].numpy().astype(np.int32), np.diff(bounds)


def joined(first: str | None, second: str | None) -> str | None:
    """Two texts as one, from which both can be told; None where one is missing."""
    return None if first is None or second is None else f"{len(first)}:{first}{second}"


def _apart(text: str) -> tuple[str, str]:
    length, _, rest = text.partition(":")
    return rest[: int(length)], rest[int(length) :]


class PairTexts:
    """A data set's column of pairs: the texts of one column, or of its lists, each joined to the first column's text.

    As `token_store` reads a `datasets.Dataset`; nothing is held but what is asked for.

    Args:
        dataset: A `datasets.Dataset`.
        first: A column of texts.
        second: A column of texts, or of lists of them.
    """

    def __init__(self, dataset: Any, first: str, second: str) -> None:
        self.first, self.second = first, second
        self._rows = dataset.with_format("arrow", columns=[first, second])
        self.features = {second: dataset.features[second]}

    def with_format(self, kind: str, columns: list[str]) -> PairTexts:
        """Itself: it has one column, and Arrow's format."""
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> Any:
        table = self._rows[rows]
        firsts, seconds = table.column(self.first).to_pylist(), table.column(self.second).to_pylist()
        both = zip(firsts, seconds, strict=True)
        if is_list(table.schema.field(self.second).type):
            lists = [None if texts is None else [joined(first, text) for text in texts] for first, texts in both]
            return pa.table({self.second: pa.array(lists, pa.large_list(pa.large_string()))})
        return pa.table({self.second: pa.array([joined(first, text) for first, text in both], pa.large_string())})


__all__ = ["PairTexts", "WholeRecipe", "joined"]
