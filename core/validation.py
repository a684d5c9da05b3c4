"""Checks of rows and of whole data sets, made before any weight is loaded.

A row is at fault for itself (`RowChecker.check`, `label_faults`) or the set as a whole is (`RowChecker.finish`). A
bad row can be left out; a set in which, say, every positive is the same text can not be trained on at all.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .columns import CLASSES, EXAMPLE, LABELLED_PAIRS, PAIRS, Columns, is_ignorable
from .errors import DataError
from .readers import TO_UTF8, BadRow, Row, place

# Whole numbers beyond this are not exact in float64, which is what a label may become.
LARGEST_LABEL = 2**53
_BOOLS = {"true": 1, "false": 0}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one cell; the parts are those of `BadRow`."""

    reason: str
    detail: str
    fix: str

    def at(self, row: int, column: str) -> BadRow:
        """The bad row this cell makes."""
        return BadRow(row=row, column=column, reason=self.reason, detail=self.detail, fix=self.fix)


@dataclass(frozen=True, slots=True)
class GoodRow:
    """A row that passed: its number, its texts in loss order and its label, None where the data has none."""

    number: int
    texts: list[str]
    label: int | float | None


class Labels:
    """A column of numbers at 8 bytes each: whole numbers until the first that is a float, floats from then on."""

    def __init__(self) -> None:
        self.values: array[Any] = array("q")

    def append(self, value: int | float) -> None:
        """Add a label."""
        if isinstance(value, float) and self.values.typecode == "q":
            self.values = array("d", self.values)
        self.values.append(value)


def text_fault(value: object) -> Fault | None:
    """Why `value` cannot be a text to train on, or None if it can."""
    if isinstance(value, str):
        if not value or value.isspace():
            return Fault("cell is empty", "only white space" if value else "", "Fill it in")
        if not value.isascii():
            return _unicode_fault(value)
        return None
    if value is None:
        return Fault("cell is empty", "null", "Fill it in")
    if isinstance(value, list | tuple):
        fix = "Give every text a column of its own, e.g. negative_1, negative_2"
        return Fault("cell is not text but a list", f"of {len(value)}", fix)
    if isinstance(value, bool | Real):
        fix = f"Write it as text, or name the text columns, e.g. {EXAMPLE}"
        return Fault("cell is not text but a number", repr(value), fix)
    fix = f"Write it as text, or name the text columns, e.g. {EXAMPLE}"
    return Fault(f"cell is not text but {type(value).__name__}", "", fix)


def _unicode_fault(value: str) -> Fault | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        char = value[error.start]
        at = f"at character {error.start + 1}"
        if "\udc80" <= char <= "\udcff":  # how the readers hand on a byte that is not UTF-8
            return Fault("cell is not UTF-8", f"byte {ord(char) - 0xDC00:#04x} {at}", TO_UTF8)
        return Fault("cell holds half a character", f"{char!r}, a lone surrogate, {at}", "Mend the text")
    return None


def label_value(value: object, *, kind: str, textual: bool = False) -> int | float | Fault:
    """The number that a label cell holds, or what is wrong with it.

    Args:
        value: The cell.
        kind: The kind of data; for `classes` the number must be whole (2.0 counts) and not negative.
        textual: The source holds text only (CSV), so "0.5" is a number.

    Returns:
        An int where the cell is written as a whole number, true or false, else a float.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return Fault("label is empty", "", "Fill it in")
    number = _from_text(value) if textual and isinstance(value, str) else value
    if isinstance(number, Integral):
        number = int(number)
    elif isinstance(number, Real):
        number = float(number)
    else:
        fix = "Number the classes 0, 1, 2, …" if kind == CLASSES else "Write a number"
        if isinstance(value, str) and not textual and isinstance(_from_text(value), Real):
            fix = "Write it without quotes"
        return Fault("label is not a number", repr(value)[:60], fix)
    if isinstance(number, float) and not math.isfinite(number):
        return Fault("label is not finite", str(number), "Write a finite number")
    if isinstance(number, int) and abs(number) > LARGEST_LABEL:
        return Fault("label is out of range", f"{number:.3g}" if abs(number) < 10**300 else "", "Write one below 2**53")
    if kind == CLASSES:
        if number != int(number):
            fix = "Number the classes 0, 1, 2, …; for a score of two texts add the second text column"
            return Fault("label is out of range", f"{number} is not whole, so no class", fix)
        if number < 0:
            return Fault("label is out of range", f"{number:g} is negative, so no class", "Number the classes from 0")
        return int(number)
    return number


def _from_text(text: str) -> object:
    word = text.strip()
    if word.lower() in _BOOLS:
        return _BOOLS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return text


def label_faults(columns: Columns, labels: Sequence[int | float]) -> Iterator[tuple[int, Fault]]:
    """The labels that do not suit the kind, which is known for sure only now: (index, fault)."""
    if columns.kind == LABELLED_PAIRS:
        fix = "Use 0 (different) and 1 (alike); if it is a degree, call the column 'score'"
        for index, label in enumerate(labels):
            if label not in (0, 1):
                yield index, Fault("label is out of range", f"{label}", fix)


class RowChecker:
    """Checks rows one by one and remembers the little that the checks of the whole set need.

    Args:
        columns: The columns to train on.
        names: All columns of the first row, for sources whose rows may differ (JSON lines): a later row may have
            no other text column. None where a mapping says what to use, or where rows cannot differ.
        textual: The source holds text only (CSV).
    """

    def __init__(self, columns: Columns, *, names: Sequence[str] | None = None, textual: bool = False) -> None:
        self.columns, self._textual = columns, textual
        self._names = None if names is None else frozenset(names)
        self._texts = [columns.source(name) for name in columns.texts]
        self._label = None if columns.label is None else columns.source(columns.label)
        self._first: list[str] | None = None
        self._constant = [True] * len(self._texts)
        self._twins = len(self._texts) >= 2  # anchor and positive have been equal in every row so far

    def check(self, row: Row) -> GoodRow | BadRow:
        """The row's texts and label, or what is wrong with its first bad cell."""
        texts: list[str] = []
        for name in self._texts:
            if name not in row.cells:
                return self._missing(row, name)
            fault = text_fault(row.cells[name])
            if fault is not None:
                return fault.at(row.number, name)
            texts.append(row.cells[name])
        label: int | float | None = None
        if self._label is not None:
            if self._label not in row.cells:
                return self._missing(row, self._label)
            value = label_value(row.cells[self._label], kind=self.columns.kind, textual=self._textual)
            if isinstance(value, Fault):
                return value.at(row.number, self._label)
            label = value
        if self._names is not None and not row.cells.keys() <= self._names:
            extra = next((name for name in row.cells if name not in self._names and not is_ignorable(name)), None)
            if extra is not None:
                fix = f"Give every row the same columns, or name those to use, e.g. {EXAMPLE}"
                return BadRow(row=row.number, column=extra, reason="the first row has no such column", fix=fix)
        self._remember(texts)
        return GoodRow(row.number, texts, label)

    def _missing(self, row: Row, name: str) -> BadRow:
        detail = f"it has {', '.join(map(str, row.cells)) or 'no columns'}"
        fix = f"Add it, or name the columns to use, e.g. {EXAMPLE}"
        return BadRow(row=row.number, column=name, reason="row lacks the column", detail=detail, fix=fix)

    def _remember(self, texts: list[str]) -> None:
        if self._first is None:
            self._first = texts
        for index, constant in enumerate(self._constant):
            if constant and texts[index] != self._first[index]:
                self._constant[index] = False
        if self._twins and texts[0] != texts[1]:
            self._twins = False

    def finish(self, where: str, labels: Sequence[int | float]) -> None:
        """Check the set as a whole, once at least two rows have passed.

        Args:
            where: The source, as errors should call it.
            labels: The labels of the rows that are kept; empty where there is no label.

        Raises:
            DataError: All rows share a text that must vary, anchors equal their positives throughout, or the labels
                leave nothing to learn.
        """
        if self._twins:
            what = f"every row has the same text here and in '{self._texts[0]}'"
            fix = "Pair each text with a different one that should be near it"
            raise DataError(what, where=place(where, column=self._texts[1]), fix=fix)
        if self.columns.kind in (PAIRS, CLASSES):
            self._check_constant(where)
        if self._label is not None:
            self._check_labels(place(where, column=self._label), labels)

    def _check_constant(self, where: str) -> None:
        for index, name in enumerate(self._texts):
            if self._constant[index] and self._first is not None:
                text = self._first[index]
                shown = repr(text if len(text) <= 40 else text[:39] + "…")
                fix = "Check that it is the right column; every row needs a text of its own"
                if index == 1:
                    fix = f"{fix}, as each row's positive is a negative to all other rows"
                raise DataError(f"every row has the same text, {shown}", where=place(where, column=name), fix=fix)

    def _check_labels(self, where: str, labels: Sequence[int | float]) -> None:
        if all(label == labels[0] for label in labels):
            fix = "Add rows with another label, or remove the column"
            raise DataError(f"every label is {labels[0]}", where=where, fix=fix)
        if self.columns.kind == CLASSES and max(Counter(labels).values()) == 1:
            fix = "Use the class as the label, not a number of the row"
            raise DataError("no label occurs twice, so no two texts are of one class", where=where, fix=fix)
