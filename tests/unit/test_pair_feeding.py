"""Columns of a cross-encoder's run in the token store: lists of texts, whole pairs, rows with their numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from datasets import Dataset  # type: ignore[import-untyped]

from burnish.core import token_store
from burnish.core.cross_encoder import CrossEncoder
from burnish.core.errors import DataError
from burnish.core.pair_feeding import NumberedRows, TextColumn
from burnish.core.pair_tokens import TextRecipe, TokenisedText
from burnish.core.token_store import list_bounds, texts_in_chunks, token_column
from burnish.core.whole_pairs import PairTexts, joined

WORDS = ["river", "bridge", "of", "Paris", "unaffable", "it", "rains"]


def lists_of(rows: int, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    return [
        [" ".join(draw.choices(WORDS, k=draw.randint(0, 4))) for _ in range(draw.randint(0, 5))] for _ in range(rows)
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 texts, and so of 2 rows of lists."""
    monkeypatch.setattr(token_store, "CHUNK", 32)


@pytest.mark.parametrize("rows", [0, 1, 2, 13, 100])
def test_lists_are_read_as_one_column_of_texts(small_chunks: None, rows: int) -> None:
    lists = lists_of(rows)
    data = Dataset.from_dict({"docs": lists, "other": list(range(rows))}) if rows else Dataset.from_dict({"docs": []})
    if not rows:
        data = data.cast_column("docs", Dataset.from_dict({"docs": [["a"]]}).features["docs"])
    chunks = list(texts_in_chunks(data, "docs"))
    assert all(len(chunk) == 32 for chunk in chunks[:-1]), "a store finds a text by its number"
    assert [text for chunk in chunks for text in chunk.to_pylist()] == [text for texts in lists for text in texts]
    bounds = list_bounds(data, "docs")
    assert np.diff(bounds).tolist() == [len(texts) for texts in lists] and bounds[0] == 0


def test_lists_after_a_selection_of_rows_are_read_too(small_chunks: None) -> None:
    lists = lists_of(40)
    data = Dataset.from_dict({"docs": lists}).select([7, 3, 3, 39, 0])
    found = [text for chunk in texts_in_chunks(data, "docs") for text in chunk.to_pylist()]
    assert found == [text for place in (7, 3, 3, 39, 0) for text in lists[place]] and found


def test_the_tokens_of_lists(small_chunks: None, tiny_bert: Path, tmp_path: Path) -> None:
    lists = lists_of(60)
    data = Dataset.from_dict({"docs": lists})
    recipe = TextRecipe(CrossEncoder(str(tiny_bert), num_labels=1, device="cpu"))
    column = TextColumn(tokens=token_column(data, "docs", recipe, tmp_path, print), bounds=list_bounds(data, "docs"))
    assert len(column.tokens) == sum(map(len, lists)) > 64, "more than two chunks"
    for row in (0, 5, 31, 32, 59):
        found = column.of(row, lists[row], {})
        assert found == lists[row] and all(type(text) is TokenisedText for text in found)
        for text in found:
            values, _ = recipe.tokenise([str(text)])
            assert text.tokens.tolist() == values.tolist()


@pytest.mark.parametrize(("docs", "row"), [([["a"], None, ["b"]], 1), ([["a"], ["b", "c", None]], 1), ([[None]], 0)])
def test_a_missing_text_is_named(docs: Any, row: int) -> None:
    data = Dataset(pa.table({"docs": pa.array(docs, pa.list_(pa.string()))}))
    with pytest.raises(DataError, match=f"^row {row} of column docs: there is no text"):
        list(texts_in_chunks(data, "docs"))


def test_pairs_of_rows_are_read_as_one_column(small_chunks: None) -> None:
    lists = lists_of(50)
    queries = [" ".join(WORDS[: place % 4]) for place in range(50)]
    data = Dataset.from_dict({"query": queries, "docs": lists, "answer": queries[::-1]})
    view: Any = PairTexts(data, "query", "docs")
    found = [text for chunk in texts_in_chunks(view, "docs") for text in chunk.to_pylist()]
    assert found == [joined(query, doc) for query, docs in zip(queries, lists, strict=True) for doc in docs]
    view = PairTexts(data, "query", "answer")
    found = [text for chunk in texts_in_chunks(view, "answer") for text in chunk.to_pylist()]
    assert found == [joined(*pair) for pair in zip(queries, queries[::-1], strict=True)]


def test_a_missing_text_of_a_pair_is_named() -> None:
    data = Dataset(pa.table({"query": ["a", None], "docs": pa.array([["b"], ["c"]])}))
    with pytest.raises(DataError, match=r"^row 1 of column docs: there is no text"):
        list(texts_in_chunks(PairTexts(data, "query", "docs"), "docs"))


def test_rows_of_several_data_sets_have_one_numbering() -> None:
    first, second = Dataset.from_dict({"text": ["a", "b", "c"]}), Dataset.from_dict({"text": ["d", "e"]})
    rows = NumberedRows([first, second])
    assert len(rows) == 5 and rows[3] == {"text": "d", "burnish_row": 3}
    assert [row["text"] for row in rows.__getitems__([4, 3])] == ["e", "d"]
    mixed = rows.__getitems__([2, 4, 0])
    assert [(row["text"], row["burnish_row"]) for row in mixed] == [("c", 2), ("e", 4), ("a", 0)]
