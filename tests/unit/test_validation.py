from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.columns import Columns
from burnish.core.errors import DataError
from burnish.core.readers import BadRow, Row
from burnish.core.validation import (
    LARGEST_LABEL,
    Fault,
    GoodRow,
    Labels,
    RowChecker,
    label_faults,
    label_value,
    text_fault,
)

PAIRS = Columns(texts=("anchor", "positive"), kind="pairs")
SCORED = Columns(texts=("a", "b"), label="score", kind="scored")
LABELLED = Columns(texts=("a", "b"), label="label", kind="labelled-pairs")
CLASSES = Columns(texts=("text",), label="label", kind="classes")


@given(st.text().filter(lambda text: text.strip()))
def test_every_text_with_a_visible_character_passes(text: str) -> None:
    assert text_fault(text) is None


@pytest.mark.parametrize(
    ("value", "reason", "detail", "fix"),
    [
        ("", "cell is empty", "", "Fill it in"),
        (" \t\n\u3000", "cell is empty", "only white space", "Fill it in"),
        (None, "cell is empty", "null", "Fill it in"),
        (3, "cell is not text but a number", "3", "Write it as text, or name the text columns"),
        (0.5, "cell is not text but a number", "0.5", "Write it as text"),
        (True, "cell is not text but a number", "True", "Write it as text"),
        (["a", "b"], "cell is not text but a list", "of 2", "negative_1, negative_2"),
        ({"a": 1}, "cell is not text but dict", "", "Write it as text"),
        (b"a", "cell is not text but bytes", "", "Write it as text"),
        (datetime.date(2026, 1, 1), "cell is not text but date", "", "Write it as text"),
        ("ab\udce9", "cell is not UTF-8", "byte 0xe9 at character 3", "Convert the file to UTF-8"),
        ("a\ud83d", "cell holds half a character", "'\\ud83d', a lone surrogate, at character 2", "Mend the text"),
    ],
)
def test_cells_that_are_no_text(value: object, reason: str, detail: str, fix: str) -> None:
    fault = text_fault(value)
    assert fault is not None
    assert (fault.reason, fault.detail) == (reason, detail)
    assert fix in fault.fix


@pytest.mark.parametrize(
    ("value", "textual", "expected"),
    [
        (1, False, 1),
        (0.25, False, 0.25),
        (True, False, 1),
        (False, False, 0),
        (np.int32(4), False, 4),
        (np.float32(0.5), False, 0.5),
        ("1", True, 1),
        (" 0.5 ", True, 0.5),
        ("1.0", True, 1.0),
        ("-1e-3", True, -0.001),
        ("True", True, 1),
        ("false", True, 0),
    ],
)
def test_labels_keep_whether_they_are_whole(value: object, textual: bool, expected: float) -> None:
    number = label_value(value, kind="scored", textual=textual)
    assert number == expected
    assert type(number) is type(expected)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_score_is_accepted_and_survives_csv(score: float) -> None:
    assert label_value(score, kind="scored") == score
    assert label_value(repr(score), kind="scored", textual=True) == score


@pytest.mark.parametrize(
    ("value", "kind", "textual", "fault"),
    [
        (None, "scored", False, Fault("label is empty", "", "Fill it in")),
        (" ", "scored", True, Fault("label is empty", "", "Fill it in")),
        ("high", "scored", True, Fault("label is not a number", "'high'", "Write a number")),
        ("sport", "classes", True, Fault("label is not a number", "'sport'", "Number the classes 0, 1, 2, …")),
        ("1", "scored", False, Fault("label is not a number", "'1'", "Write it without quotes")),
        ([1, 2], "scored", False, Fault("label is not a number", "[1, 2]", "Write a number")),
        (1 + 2j, "scored", False, Fault("label is not a number", "(1+2j)", "Write a number")),
        (math.nan, "scored", False, Fault("label is not finite", "nan", "Write a finite number")),
        ("inf", "scored", True, Fault("label is not finite", "inf", "Write a finite number")),
        (10**400, "scored", False, Fault("label is out of range", "", "Write one below 2**53")),
        (LARGEST_LABEL + 1, "classes", False, Fault("label is out of range", "9.01e+15", "Write one below 2**53")),
        (
            -1,
            "classes",
            False,
            Fault("label is out of range", "-1 is negative, so no class", "Number the classes from 0"),
        ),
    ],
)
def test_bad_labels(value: object, kind: str, textual: bool, fault: Fault) -> None:
    assert label_value(value, kind=kind, textual=textual) == fault


def test_classes_are_whole_whatever_their_type() -> None:
    number = label_value(2.0, kind="classes")
    assert (number, type(number)) == (2, int)
    fault = label_value(0.5, kind="classes")
    assert isinstance(fault, Fault)
    assert fault.detail == "0.5 is not whole, so no class"
    assert "for a score of two texts add the second text column" in fault.fix


def test_labels_are_whole_until_the_first_float() -> None:
    labels = Labels()
    for value in (0, 1, LARGEST_LABEL):
        labels.append(value)
    assert labels.values.tolist() == [0, 1, LARGEST_LABEL]
    assert all(isinstance(value, int) for value in labels.values)
    labels.append(0.5)
    labels.append(1)
    assert labels.values.tolist() == [0.0, 1.0, float(LARGEST_LABEL), 0.5, 1.0]
    assert all(isinstance(value, float) for value in labels.values)


def test_only_labelled_pairs_are_limited_to_yes_and_no() -> None:
    found = list(label_faults(LABELLED, [0, 1, 2, -1]))
    assert [(index, fault.reason, fault.detail) for index, fault in found] == [
        (2, "label is out of range", "2"),
        (3, "label is out of range", "-1"),
    ]
    assert found[0][1].fix == "Use 0 (different) and 1 (alike); if it is a degree, call the column 'score'"
    assert list(label_faults(SCORED, [0, 5, -3])) == []


def test_a_good_row_comes_in_loss_order() -> None:
    checker = RowChecker(SCORED)
    assert checker.check(Row(7, {"id": None, "score": 0.5, "b": "y", "a": "x"})) == GoodRow(7, ["x", "y"], 0.5)
    mapped = Columns(texts=("anchor", "positive"), kind="pairs", renamed=(("anchor", "positive"), ("positive", "q")))
    assert RowChecker(mapped).check(Row(1, {"positive": "x", "q": "y"})) == GoodRow(1, ["x", "y"], None)


@pytest.mark.parametrize(
    ("columns", "cells", "message"),
    [
        (
            PAIRS,
            {"anchor": "x"},
            "f, row 9, column positive: row lacks the column (it has anchor). Add it, or name the columns to use, "
            "e.g. --columns anchor=my_q --columns positive=my_doc (in a config file, columns: {anchor: my_q, positive: "
            "my_doc}), or leave such rows out with --on-bad-row=skip",
        ),
        (PAIRS, {}, "f, row 9, column anchor: row lacks the column (it has no columns). Add it"),
        (SCORED, {"a": "x", "b": "y"}, "f, row 9, column score: row lacks the column (it has a, b). Add it"),
        (
            SCORED,
            {"a": "x", "b": "", "score": "no"},
            "f, row 9, column b: cell is empty. Fill it in, or leave such rows",
        ),
        (
            SCORED,
            {"a": "x", "b": "y", "score": "no"},
            "f, row 9, column score: label is not a number ('no'). Write a n",
        ),
    ],
)
def test_bad_rows_say_where(columns: Columns, cells: dict[str, Any], message: str) -> None:
    bad = RowChecker(columns).check(Row(9, cells))
    assert isinstance(bad, BadRow)
    assert str(bad.error("f")).startswith(message)
    assert str(bad.error("f")).endswith("--on-bad-row=skip")
    assert "--on-bad-row" not in str(bad.error("f", skippable=False))


def test_rows_may_not_grow_text_columns() -> None:
    checker = RowChecker(PAIRS, names=["anchor", "positive"])
    assert isinstance(checker.check(Row(2, {"anchor": "x", "positive": "y", "doc_id": 3})), GoodRow)
    bad = checker.check(Row(3, {"anchor": "x", "positive": "y", "negative": "z"}))
    assert isinstance(bad, BadRow)
    assert str(bad.error("f")).startswith(
        "f, row 3, column negative: the first row has no such column. Give every row the same columns, or name"
    )
    assert isinstance(RowChecker(PAIRS).check(Row(3, {"anchor": "x", "positive": "y", "negative": "z"})), GoodRow)


def finish(columns: Columns, rows: list[tuple[Any, ...]]) -> None:
    """Check a whole set whose rows hold the columns in order."""
    checker, labels = RowChecker(columns), []
    for number, cells in enumerate(rows, start=1):
        good = checker.check(Row(number, dict(zip(columns.names, cells, strict=True))))
        assert isinstance(good, GoodRow)
        labels += [] if good.label is None else [good.label]
    checker.finish("f", labels)


TRIPLETS = Columns(texts=("anchor", "positive", "negative"), kind="pairs")


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (
            PAIRS,
            [("a", "same"), ("b", "same"), ("c", "same")],
            "f, column positive: every row has the same text, 'same'. Check that it is the right column; every row "
            "needs a text of its own, as each row's positive is a negative to all other rows",
        ),
        (PAIRS, [("q", "x"), ("q", "y")], "f, column anchor: every row has the same text, 'q'. Check that it is"),
        (
            TRIPLETS,
            [("a", "x", "en"), ("b", "y", "en")],
            "f, column negative: every row has the same text, 'en'. Check",
        ),
        (PAIRS, [("a", "z" * 60), ("b", "z" * 60)], f"f, column positive: every row has the same text, '{'z' * 39}…'."),
        (
            PAIRS,
            [("a", "a"), ("b", "b")],
            "f, column positive: every row has the same text here and in 'anchor'. "
            "Pair each text with a different one that should be near it",
        ),
        (SCORED, [("a", "a", 0), ("b", "b", 1)], "f, column b: every row has the same text here and in 'a'."),
        (
            SCORED,
            [("a", "b", 0.5), ("c", "d", 0.5)],
            "f, column score: every label is 0.5. Add rows with another label",
        ),
        (
            CLASSES,
            [("a", 1), ("b", 1)],
            "f, column label: every label is 1. Add rows with another label, or remove the",
        ),
        (
            CLASSES,
            [("a", 1), ("b", 2)],
            "f, column label: no label occurs twice, so no two texts are of one class. Use",
        ),
        (CLASSES, [("a", 1), ("a", 2), ("a", 1)], "f, column text: every row has the same text, 'a'. Check that"),
    ],
)
def test_sets_that_cannot_be_trained_on(columns: Columns, rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(DataError) as caught:
        finish(columns, rows)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (PAIRS, [("a", "same"), ("b", "same"), ("c", "other")]),
        (PAIRS, [("a", "a"), ("b", "c")]),
        (TRIPLETS, [("a", "b", "x"), ("c", "d", "y")]),
        (SCORED, [("one query", "x", 0.1), ("one query", "y", 0.9)]),
        (LABELLED, [("x", "one text", 0), ("y", "one text", 1)]),
        (CLASSES, [("a", 1), ("b", 2), ("c", 1)]),
    ],
)
def test_sets_that_are_just_within_the_rules(columns: Columns, rows: list[tuple[Any, ...]]) -> None:
    finish(columns, rows)
