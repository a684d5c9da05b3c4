"""Batches without duplicates: Sentence Transformers' own, batch for batch, from numbers instead of texts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from burnish.core.batching import NoDuplicates, fits, text_numbers
from burnish.core.errors import DataError


def data(rows: int, questions: int, answers: int, **more: list[Any]) -> Dataset:
    rng = random.Random(rows)
    columns = {
        "anchor": [f"q {rng.randrange(questions)}" for _ in range(rows)],
        "positive": ["q 0" if rng.random() < 0.03 else f"a {rng.randrange(answers)}" for _ in range(rows)],
    }
    return Dataset.from_dict({**columns, **more})


def batches(kind: Any, dataset: Dataset, size: int, *, drop_last: bool = False, epoch: int = 0) -> list[list[int]]:
    sampler = kind(dataset, size, drop_last, ["label", "score"], torch.Generator(), 7)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 3))
def test_the_batches_are_sentence_transformers_own(
    rows: int, questions: int, answers: int, size: int, drop_last: bool, epoch: int
) -> None:
    dataset = data(rows, questions, answers)
    expected = batches(NoDuplicatesBatchSampler, dataset, size, drop_last=drop_last, epoch=epoch)
    assert batches(NoDuplicates, dataset, size, drop_last=drop_last, epoch=epoch) == expected


@pytest.mark.parametrize(("questions", "answers"), [(1500, 1500), (150, 1500), (60, 60)])
def test_many_rows(questions: int, answers: int) -> None:
    dataset = data(1500, questions, answers)
    found = batches(NoDuplicates, dataset, 32)
    assert found == batches(NoDuplicatesBatchSampler, dataset, 32)
    texts = list(zip(*dataset.to_dict().values(), strict=True))
    plain = [list(range(start, start + 32)) for start in range(0, 1472, 32)]
    assert not all(apart(batch, texts) for batch in plain), "no batch in the data's own order has a duplicate"
    assert all(apart(batch, texts) for batch in found)
    assert sorted(row for batch in found for row in batch) == list(range(1500))


def apart(batch: list[int], texts: list[tuple[str, str]]) -> bool:
    values = [text for row in batch for text in set(texts[row])]
    return len(values) == len(set(values))


def test_labels_do_not_count_and_epochs_differ() -> None:
    dataset = data(40, 1000, 1000, score=[1.0] * 40)
    assert max(map(len, batches(NoDuplicates, dataset, 8))) == 8, "equal scores kept rows apart"
    assert batches(NoDuplicates, dataset, 8) == batches(NoDuplicatesBatchSampler, dataset, 8)
    assert batches(NoDuplicates, dataset, 8, epoch=1) != batches(NoDuplicates, dataset, 8)


def test_numbers_are_equal_where_texts_are() -> None:
    dataset = Dataset.from_dict({"a": ["x", "y", "é"], "b": ["y", "y", ""]}).select([2, 0, 1])
    numbers, different = text_numbers(dataset)
    assert numbers.shape == (3, 2) and numbers[1, 1] == numbers[2, 0] == numbers[2, 1]
    assert len(np.unique(numbers)) == 4 and different.tolist() == [2, 2, 1]


def test_a_missing_text_is_an_error() -> None:
    with pytest.raises(DataError, match="row 1 of column b: there is no text"):
        text_numbers(Dataset.from_dict({"a": ["x", "y"], "b": ["z", None]}))


def test_only_plain_texts_fit() -> None:
    dataset = data(4, 9, 9, score=[0.5] * 4)
    assert fits(dataset, ["score"]) and not fits(dataset, []), "a number is no text"
    assert not fits(dataset.with_transform(dict), ["score"])
    assert not fits(dataset.with_format(None, columns=["anchor"]), ["score"])
    assert not fits(dataset.to_iterable_dataset(), ["score"])
    assert not fits(Dataset.from_dict({"a": [["x", "y"]]}), [])


ROWS, SIZE, EPOCHS = 48, 8, 400


def meetings(kind: Any) -> np.ndarray[Any, Any]:
    """(rows, rows) share of epochs in which two rows were in one batch."""
    lengths = [row * 5 + 3 for row in range(ROWS)]
    dataset = Dataset.from_dict({"anchor": [f"{row} {'x' * length}" for row, length in enumerate(lengths)]})
    counts = np.zeros((ROWS, ROWS))
    for epoch in range(EPOCHS):
        for batch in batches(kind, dataset, SIZE, epoch=epoch):
            counts[np.ix_(batch, batch)] += 1
    return counts / EPOCHS


class ByLength(NoDuplicates):
    """What this repository does not do: batches composed by length inside shuffled windows of three batches."""

    def __iter__(self) -> Any:
        rows = [row for batch in super().__iter__() for row in batch]
        for start in range(0, len(rows), 3 * SIZE):
            window = sorted(rows[start : start + 3 * SIZE])  # a longer text has a higher number
            yield from (window[first : first + SIZE] for first in range(0, len(window), SIZE))


def test_how_often_two_rows_meet_does_not_depend_on_their_lengths() -> None:
    """Negatives are the other rows of a batch: `docs/decisions/0007-batches-by-length.md`."""
    expected = (SIZE - 1) / (ROWS - 1)
    spread = (expected * (1 - expected) / EPOCHS) ** 0.5
    apart = np.abs(np.subtract.outer(np.arange(ROWS), np.arange(ROWS)))

    def close_and_far(shares: Any) -> tuple[float, float]:
        return float(shares[(apart > 0) & (apart < 6)].mean()), float(shares[apart > 30].mean())

    found = meetings(NoDuplicates)
    off = np.abs(found - expected)[apart > 0]
    assert off.max() < 5 * spread, "5 standard deviations, for 1,128 pairs"
    assert close_and_far(found) == pytest.approx((expected, expected), rel=0.05)
    close, far = close_and_far(meetings(ByLength))
    assert close > 2 * expected and far < expected / 2, "this test would not see a bias"
