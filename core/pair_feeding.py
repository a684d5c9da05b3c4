"""A cross-encoder's run, tokenised once: its loader, whose batches hold texts that carry their tokens.

Sentence Transformers' losses for cross-encoders get columns of texts, make pairs of them, and have the model tokenise
each pair in every step. Here the same columns reach the same losses, as `TokenisedText`s.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from .feeding import format_refusal, loader_like, name_of, said_of_store, text_columns
from .pair_tokens import PairRecipe, TextRecipe, TokenisedText
from .token_store import TokenColumn, list_bounds, store_folder, token_column
from .tokenising import Recipe, why_not
from .whole_pairs import PairTexts, WholeRecipe

Say: TypeAlias = Callable[[str], None]

_ROW = "burnish_row"
_TEXT = ("string", "large_string")
_SAMPLES = 24
"""Rows of a data set whose pairs are compared with the model's own preprocessing."""


def refusal(recipe: PairRecipe, dataset: Any, collator: Any) -> str | None:
    """Why a run's texts cannot be tokenised ahead; None if they can.

    Args:
        recipe: How the pairs of the run's CrossEncoder are put together.
        dataset: What the run trains on.
        collator: The run's collator.
    """
    from datasets import Dataset as Stored  # type: ignore[import-untyped]
    from datasets import DatasetDict
    from sentence_transformers.cross_encoder import CrossEncoderTrainer

    model = recipe.model
    if getattr(model, "burnish", None) is None or model.burnish.packed is None:
        return "the input is padded"
    own: type[Any] = CrossEncoderTrainer.data_collator_class
    if type(collator) is not own:
        return "a data collator was given"
    if collator.router_mapping:
        return "columns are routed"
    if reason := why_not(model, templates=True):
        return reason
    for part in dataset.values() if isinstance(dataset, DatasetDict) else [dataset]:
        if not isinstance(part, Stored):
            return f"the data set is a {type(part).__name__}"
        if reason := format_refusal(part):
            return reason
        names = text_columns(part, collator)
        if len(names) > 1 and _holds_lists(part, names[0]):
            return f"column {names[0]}, whose texts come first in pairs, holds lists"
        for name in names:
            feature = part.features[name]
            if getattr(getattr(feature, "feature", feature), "dtype", None) not in _TEXT:
                return f"column {name} holds no plain texts, nor lists of them"
    return None


@dataclass(slots=True, kw_only=True)
class TextColumn:
    """A column's tokens: of one text a row, or of a list of them.

    Args:
        tokens: Of all texts, one after another.
        prompt: What stands before each.
        bounds: (rows + 1,) the first text of each row; None where each row has one.
        first: Of tokens that are those of whole pairs, the column of the other text; "" where there is none.
    """

    tokens: TokenColumn
    prompt: str = ""
    bounds: NDArray[np.int64] | None = None
    first: str | None = None

    def of(self, number: int, texts: Any, row: Mapping[str, Any]) -> Any:
        """What row `number` holds, with its tokens."""
        partner = None if self.first is None else str(row[self.first]) if self.first else ""
        if self.bounds is None:
            return TokenisedText(texts, self.tokens[number], self.prompt, partner)
        start = int(self.bounds[number])
        return [
            TokenisedText(text, self.tokens[start + place], self.prompt, partner) for place, text in enumerate(texts)
        ]


class NumberedRows(Dataset[dict[str, Any]]):
    """The rows of data sets one after another, each with its number among them."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        number = bisect_right(self.starts, rows[0]) - 1
        low, high = self.starts[number], self.starts[number + 1]
        if low <= min(rows) and max(rows) < high:
            found = self.parts[number].__getitems__([row - low for row in rows])
        else:  # a sampler of the user's own may mix data sets
            numbers = [bisect_right(self.starts, row) - 1 for row in rows]
            found = [self.parts[one][row - self.starts[one]] for one, row in zip(numbers, rows, strict=True)]
        return [{**texts, _ROW: row} for texts, row in zip(found, rows, strict=True)]


@dataclass(slots=True, kw_only=True)
class PairCollator:
    """Sentence Transformers' own collator, for rows with numbers, whose texts get their tokens first.

    Args:
        stock: It.
        columns: Of each data set, the columns of texts by name.
        starts: The number of each data set's first row.
    """

    stock: Any
    columns: list[dict[str, TextColumn]]
    starts: list[int]

    @property
    def valid_label_columns(self) -> Any:
        """Which columns are labels, by name."""
        return self.stock.valid_label_columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch: what the stock collator makes of the rows."""
        batch: dict[str, Any] = self.stock([self.marked(row) for row in rows])
        return batch

    def marked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row without its number, its texts with their tokens."""
        number = bisect_right(self.starts, row[_ROW]) - 1
        columns, place = self.columns[number], row[_ROW] - self.starts[number]
        return {
            name: columns[name].of(place, value, row) if name in columns else value
            for name, value in row.items()
            if name != _ROW
        }


@dataclass(slots=True, kw_only=True)
class PairFeed:
    """A run's rows, how to collate them, and how its pairs are put together; the figures say what tokenising did."""

    rows: NumberedRows
    collator: PairCollator
    recipe: PairRecipe
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    folder: str = ""
    whole: str | None = None
    """Why pairs are in the store as wholes; None where their texts are."""
    unlike: str | None = None
    """What the model's own preprocessing makes otherwise; None where it makes the same."""

    def said(self) -> str:
        """One line on what was tokenised, and where it is."""
        what = "texts" if self.whole is None else f"pairs, tokenised whole since {self.whole}"
        return f"{self.texts:,} {what}: {self.tokens:,} tokens, {said_of_store(self.seconds, self.folder, self.spent)}"

    def loader(self, stock: DataLoader[Any]) -> DataLoader[Any]:
        """A loader of these rows, in the order and with the workers of Sentence Transformers' own."""
        return loader_like(stock, self.rows, self.collator)


def feed(recipe: PairRecipe, dataset: Any, stock: Any, *, folder: str | None, say: Callable[[str], None]) -> PairFeed:
    """Tokenise a run's texts, or find them tokenised, and compare pairs of them with the model's own preprocessing.

    Args:
        recipe: How the pairs of a packed CrossEncoder are put together; it is settled for the run's prompts.
        dataset: What `refusal` lets pass: a `Dataset` or a `DatasetDict`.
        stock: The run's collator: its prompts and label columns hold.
        folder: Of the token stores; None for the user's cache.
        say: Told, in one line, what is worth knowing.

    Raises:
        BurnishError: If the stores cannot be written.
        DataError: If a text is missing.
    """
    why = why_not(recipe.model) or recipe.why_not()
    if why is None:
        made = _fed(recipe, dataset, stock, folder, say, whole=None)
        if made.unlike is None:
            return made
        why = made.unlike
    made = _fed(recipe, dataset, stock, folder, say, whole=why)
    if made.unlike is not None:
        made.unlike = f"{why}; of whole pairs, {made.unlike}"
    return made


def _fed(recipe: PairRecipe, dataset: Any, stock: Any, folder: str | None, say: Say, whole: str | None) -> PairFeed:
    """By texts, or by pairs for the reason that `whole` gives."""
    started = time.perf_counter()
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    place = store_folder(folder)
    recipes = {"": recipe.plain}
    columns = []
    for part in parts:
        name = name_of(part)
        prompt = stock._resolve_scalar(stock.prompts, {} if name is None else {"dataset_name": name}) or ""
        names = text_columns(part, stock)
        if whole is not None:
            columns.append(_wholes(part, names, WholeRecipe(recipe.model, prompt), place, say))
            continue
        recipes.setdefault(prompt, TextRecipe(recipe.model, prompt))
        columns.append(_columns(part, names, prompt, recipes, place, say))
    rows = NumberedRows(parts)
    collator = PairCollator(stock=stock, columns=columns, starts=rows.starts[:-1])
    found = [column.tokens for each in columns for column in each.values()]
    made = PairFeed(
        rows=rows, collator=collator, recipe=recipe, texts=sum(map(len, found)),
        tokens=sum(column.tokens for column in found), seconds=sum(column.seconds for column in found),
        folder=str(place), whole=whole,
    )  # fmt: skip
    made.unlike = next((why for number in range(len(parts)) if (why := _settle(made, number, recipes))), None)
    made.spent = time.perf_counter() - started
    return made


def _wholes(part: Any, names: Sequence[str], recipe: WholeRecipe, place: Any, say: Say) -> dict[str, TextColumn]:
    """A data set's columns of pairs: each text with the first column's; a column alone is one of texts."""
    first, *others = names
    if not others:
        bounds = _bounds(part, first)
        tokens = token_column(part, first, Recipe(recipe.model, recipe.prompt), place, say)
        return {first: TextColumn(tokens=tokens, prompt=recipe.prompt, bounds=bounds, first="")}
    found = {}
    for name in others:
        bounds = _bounds(part, name)
        tokens = token_column(PairTexts(part, first, name), name, recipe, place, say)
        found[name] = TextColumn(tokens=tokens, prompt=recipe.prompt, bounds=bounds, first=first)
    return found


def _columns(
    part: Any, names: Sequence[str], prompt: str, recipes: Mapping[str, TextRecipe], place: Any, say: Say
) -> dict[str, TextColumn]:
    """A data set's columns; the prompt stands before the first text of a pair, which is of the first of them."""
    found = {}
    for number, name in enumerate(names):
        before = "" if number else prompt
        bounds = _bounds(part, name)
        tokens = token_column(part, name, recipes[before], place, say)
        found[name] = TextColumn(tokens=tokens, prompt=before, bounds=bounds)
    return found


def _settle(made: PairFeed, number: int, recipes: Mapping[str, TextRecipe]) -> str | None:
    """Compare pairs of one data set, the longest and the shortest texts among them, with the model's preprocessing."""
    columns, rows = list(made.collator.columns[number].values()), made.rows
    size = rows.starts[number + 1] - rows.starts[number]
    if not size or not columns:
        return None
    chosen = {*range(0, size, max(1, size // _SAMPLES))}
    for column in columns:
        lengths = column.tokens.lengths()
        if column.bounds is not None:  # of a list, the longest text that begins in it
            lengths = np.asarray([lengths[first:last].max(initial=0) for first, last in _spans(column.bounds)])
        order = np.argsort(lengths, kind="stable")
        chosen |= {int(place) for place in (*order[:2], *order[-4:])}
    found = rows.__getitems__([rows.starts[number] + place for place in sorted(chosen)])
    marked = [made.collator.marked(row) for row in found]
    names = text_columns(rows.parts[number], made.collator)
    texts = [[_listed(row[name]) for name in names] for row in marked]
    samples: list[Any] = [
        (one, other) for first, *others in texts for one in first for rest in others for other in rest
    ]
    if len(names) == 1:
        samples = [one for first, *_ in texts for one in first]
    if not samples:
        return None
    if made.whole is not None:
        return made.recipe.settle_whole(samples, columns[0].prompt)
    # The first text and the last of the sample meet too: losses make pairs of any rows.
    if len(names) > 1:
        samples += [(one[0], other[1]) for one, other in zip(samples, reversed(samples), strict=True)]
    return made.recipe.settle(samples, recipes, columns[0].prompt)


def _holds_lists(part: Any, name: str) -> bool:
    return hasattr(part.features[name], "feature")


def _bounds(part: Any, name: str) -> NDArray[np.int64] | None:
    """The first text of each row of a column of lists; None for a column of texts."""
    return list_bounds(part, name) if _holds_lists(part, name) else None


def _spans(bounds: NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


__all__ = ["NumberedRows", "PairCollator", "PairFeed", "TextColumn", "feed", "refusal"]
