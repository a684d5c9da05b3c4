"""Texts with classes, several labels or numbers: read from a file or taken from a data set, and checked row by row.

| problem_type | What a label may be | What it becomes |
| --- | --- | --- |
| single_label_classification | a class's name, or its number | int64 |
| multi_label_classification | a list of names, or 0 and 1 for every label in order | C float32 of 0 and 1 |
| regression | a number, or a list of as many as the head has | float32 |

The label is the first column called `label`, `labels`, `score` or `scores`; one text column is a text, two are a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .class_losses import MULTI, REGRESSION, SINGLE, problem_of
from .columns import LABELS, is_ignorable
from .errors import ConfigError, DataError
from .readers import BadRow, Row, place
from .sources import open_source, table_rows
from .validation import Fault, text_fault

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from sentence_transformers import CrossEncoder

PROBLEMS = (SINGLE, MULTI, REGRESSION)
BATCH = 1000


@dataclass(frozen=True)
class Classes:
    """What a label means to a model.

    Args:
        names: The classes in the order of the head's outputs.
        problem: transformers' problem_type.
    """

    names: tuple[str, ...]
    problem: str

    @classmethod
    def of(cls, model: CrossEncoder) -> Classes:
        """Those of a model: `id2label` and `problem_type` of its config."""
        given: Mapping[Any, str] = getattr(model.config, "id2label", None) or {}
        named = {int(place): name for place, name in given.items()}
        return cls(tuple(str(named.get(at, f"LABEL_{at}")) for at in range(model.num_labels)), problem_of(model))

    @cached_property
    def index(self) -> dict[str, int]:
        """Each name's place."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def numbered(self) -> bool:
        """Whether the names are whole numbers themselves, such as stars from 1 to 5: a number is then a name."""
        return all(name.lstrip("-").isdigit() for name in self.names)

    def label(self, value: object, named: Sequence[str] = ()) -> int | float | list[float] | Fault:
        """What the model is trained on for a cell, or what is wrong with it.

        Args:
            value: The cell.
            named: The names that a data set has for its numbers (`datasets.ClassLabel`).
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            return Fault("label is empty", "", "Fill it in, or leave the row out")
        if self.problem == SINGLE:
            return self._place(value, named)
        if self.problem == MULTI:
            return self._several(value, named)
        return self._number(value)

    def _place(self, value: object, named: Sequence[str]) -> int | Fault:
        if isinstance(value, list | tuple):
            fix = "Give one class a row, or load the model with problem_type='multi_label_classification'"
            return Fault("label is a list", f"of {len(value)}", fix)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, Integral):
            number = int(value)
            if named and not 0 <= number < len(named):
                return Fault("label is none of the column's classes", str(number), f"Number them 0 to {len(named) - 1}")
            if named and set(named) & set(self.names):
                value = named[number]
            elif self.numbered:
                value = str(number)
            elif 0 <= number < len(self.names):
                return number
            else:
                return Fault("label is out of range", str(number), f"Number the classes 0 to {len(self.names) - 1}")
        if isinstance(value, str):
            return self.index[value] if value in self.index else self._unknown(value)
        return Fault("label is not a class", repr(value)[:60], "Write the class's name or number")

    def _unknown(self, name: str) -> Fault:
        close = get_close_matches(name, self.names, n=1)
        some = ", ".join(self.names[:6]) + (", …" if len(self.names) > 6 else "")
        fix = f"Did you mean {close[0]!r}?" if close else f"Write one of them ({some}), or name it in labels too"
        return Fault(f"label is none of the {len(self.names)} classes", repr(name)[:60], fix)

    def _several(self, value: object, named: Sequence[str]) -> list[float] | Fault:
        size = len(self.names)
        if not isinstance(value, list | tuple):
            fix = f"Write a list of names, or a list of 0 and 1 for each of the {size} labels"
            return Fault("label is not a list", repr(value)[:60], fix)
        ids = bool(named) and bool(set(named) & set(self.names))
        if ids or (all(isinstance(one, str) for one in value) and (value or size != len(value))):
            found = [0.0] * size
            for one in value:
                at = self._place(one, named)
                if isinstance(at, Fault):
                    return at
                found[at] = 1.0
            return found
        if len(value) != size:
            fix = f"Write names, or 0 and 1 for each of the {size} labels"
            return Fault("label has another length", f"{len(value)} numbers", fix)
        if odd := [one for one in value if not isinstance(one, Real) or float(one) not in (0.0, 1.0)]:
            return Fault("label holds something other than 0 and 1", repr(odd[0])[:60], "Write 0 or 1")
        return [float(one) for one in value]

    def _number(self, value: object) -> float | list[float] | Fault:
        size = len(self.names)
        if size > 1:
            if not isinstance(value, list | tuple) or len(value) != size:
                return Fault(f"label is not a list of {size} numbers", repr(value)[:60], "Write one for each output")
            several: list[float] = []
            for one in value:
                number = self._one(one)
                if isinstance(number, Fault):
                    return number
                several.append(number)
            return several
        return self._one(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value)

    def _one(self, value: object) -> float | Fault:
        try:
            number = float(value) if isinstance(value, str | Real) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            return Fault("label is not a finite number", repr(value)[:60], "Write a number")
        return number


def prepare(
    dataset: datasets.Dataset, classes: Classes, where: str, say: Callable[[str], None] | None = None
) -> datasets.Dataset:
    """A data set with one or two text columns and a `label` that the losses take.

    Args:
        dataset: Its columns are as the module says; others are left out, and `say` is told.
        classes: What a label means.
        where: What errors call the data set.
        say: Takes one line.

    Raises:
        DataError: At the first row that cannot be trained on, or if the columns do not fit.
    """
    texts, rows, dropped = _rows_of(dataset, classes, where)
    if dropped and say is not None:
        say(f"{where}: columns left out: {', '.join(dropped)}")
    values = [value for _, value in rows]
    return _with_labels(dataset.select_columns(list(texts)).with_format(None), values, classes)


def texts_and_labels(dataset: datasets.Dataset, classes: Classes, where: str) -> tuple[list[Any], list[Any]]:
    """What a data set holds, to measure on: its texts, pairs as tuples, and its labels as `prepare` makes them.

    Raises:
        DataError: At the first row that cannot be measured on, or if the columns do not fit.
    """
    found = list(_rows_of(dataset, classes, where)[1])
    texts = [row[0] if len(row) == 1 else tuple(row) for row, _ in found]
    return texts, [value for _, value in found]


def _rows_of(
    dataset: datasets.Dataset, classes: Classes, where: str
) -> tuple[tuple[str, ...], Iterator[tuple[list[str], Any]], list[str]]:
    texts, label, dropped = split_columns(dataset.column_names, where, _text_features(dataset))
    wanted = [*texts, label]
    rows = table_rows(dataset.select_columns(wanted).with_format("arrow").iter(BATCH), wanted)
    return texts, _checked(rows, texts, label, classes, class_names(dataset.features[label]), where), dropped


def load_classes(
    source: str | Path,
    split: str = "train",
    *,
    labels: Sequence[str] | None = None,
    problem_type: str = SINGLE,
) -> datasets.Dataset:
    """Read and check texts with classes, several labels or numbers.

    Args:
        source: A .jsonl, .csv, .tsv (each also .gz) or .parquet file, a folder written by `save_to_disk`, or a Hub id.
        split: The split of a `datasets` folder or Hub data set.
        labels: The classes; None takes those that occur, sorted.
        problem_type: transformers' name for the kind of label.

    Returns:
        One or two text columns and `label`, whose feature holds the names: `dataset.features["label"].names`, or
        `.feature.names` where texts have several. For a regression it is a number.

    Raises:
        ConfigError: If the problem_type is unknown, or a regression is given labels.
        DataError: At the first row that cannot be trained on, or if the columns do not fit.
    """
    check_problem(problem_type, labels)
    opened = open_source(source, split)
    with closing(opened.rows(None)) as rows:
        kept = list(_sound(rows, opened.where))
    if not kept:
        raise DataError("no rows", where=opened.where, fix="Give at least one for each class")
    names = opened.names or tuple(dict.fromkeys(name for row in kept for name in row.cells))
    texts, label, _ = split_columns(names, opened.where)
    named = class_names(opened.dataset.features[label]) if opened.dataset is not None else ()
    if labels is None and problem_type != REGRESSION:
        labels = named or _occurring((row.cells.get(label) for row in kept), problem_type, opened.where)
    classes = Classes(tuple(map(str, labels or ("score",))), problem_type)
    checked = list(_checked(kept, texts, label, classes, named, opened.where))
    return _named(_texts(checked, texts), [value for _, value in checked], classes)


def split_columns(
    names: Sequence[str], where: str, textual: Mapping[str, bool] | None = None
) -> tuple[tuple[str, ...], str, list[str]]:
    """(the text columns, the label, what is left out) of a data set's columns.

    Args:
        names: All of them, in order.
        where: What errors call the data set.
        textual: Which ones hold text, where that is known without looking.

    Raises:
        DataError: If there is no label, or not one or two texts.
    """
    label = next((name for name in LABELS if name in names), None)
    if label is None:
        fix = f"Call it one of {', '.join(LABELS)}: dataset.rename_column(…). The columns are: {', '.join(names)}"
        raise DataError("there is no label column", where=where, fix=fix)
    others = [name for name in names if name != label]
    texts = [name for name in others if not is_ignorable(name) and name not in LABELS]
    if textual is not None:
        texts = [name for name in texts if textual.get(name, False)]
    if not 1 <= len(texts) <= 2:
        fix = f"Keep one text column, or two that make a pair: dataset.select_columns([…, '{label}'])"
        what = f"{len(texts)} text columns{': ' if texts else ''}{', '.join(texts)}"
        raise DataError(what, where=where, fix=fix)
    return tuple(texts), label, [name for name in others if name not in texts]


def class_names(feature: Any) -> tuple[str, ...]:
    """The names that a feature has for its numbers: of `ClassLabel`, or of a list of them; else nothing."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return tuple(names or ())


def check_problem(problem_type: str, labels: Sequence[str] | None) -> None:
    """Refuse a problem_type that transformers does not know, and classes of a regression."""
    if problem_type not in PROBLEMS:
        raise ConfigError(f"{problem_type!r} is unknown", where="problem_type", fix=f"Use one of {', '.join(PROBLEMS)}")
    if labels is not None and (repeated := {str(one) for one in labels if list(map(str, labels)).count(str(one)) > 1}):
        raise ConfigError(f"{min(repeated)!r} occurs twice", where="labels", fix="Name every class once")


def _sound(rows: Iterable[Row | BadRow], where: str) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, BadRow):
            raise row.error(where, skippable=False)
        yield row


def _checked(
    rows: Iterable[Row], texts: Sequence[str], label: str, classes: Classes, named: Sequence[str], where: str
) -> Iterator[tuple[list[str], Any]]:
    for number, cells in rows:
        found = []
        for name in texts:
            text = cells.get(name)
            if fault := text_fault(text):
                raise fault.at(number, name).error(where, skippable=False)
            found.append(str(text))
        value = classes.label(cells.get(label), named)
        if isinstance(value, Fault):
            raise value.at(number, label).error(where, skippable=False)
        yield found, value


def _occurring(values: Iterable[object], problem: str, where: str) -> tuple[str, ...]:
    several = (one for value in values for one in (value if isinstance(value, list | tuple) else [value]))
    found = {one for one in several if one is not None and str(one).strip()}
    numbers = all(isinstance(one, Integral) for one in found)
    if problem == MULTI and numbers:
        fix = "Pass labels=[…], in the order of the 0 and 1"
        raise DataError("its labels are numbers without names", where=place(where, column="label"), fix=fix)
    ordered = sorted(found) if numbers else sorted(found, key=str)  # type: ignore[type-var]
    return tuple(str(one) for one in ordered)


def _text_features(dataset: datasets.Dataset) -> dict[str, bool]:
    kinds = ("string", "large_string", "null")
    return {name: getattr(feature, "dtype", "") in kinds for name, feature in dataset.features.items()}


def _texts(checked: Sequence[tuple[list[str], Any]], names: Sequence[str]) -> datasets.Dataset:
    from datasets import Dataset

    return Dataset.from_dict({name: [texts[at] for texts, _ in checked] for at, name in enumerate(names)})


def _with_labels(plain: datasets.Dataset, values: Sequence[Any], classes: Classes) -> datasets.Dataset:
    from datasets import List, Value

    number = Value("int64") if classes.problem == SINGLE else Value("float32")
    several = classes.problem == MULTI or (classes.problem == REGRESSION and len(classes.names) > 1)
    feature = List(number, length=len(classes.names)) if several else number
    return plain.add_column("label", list(values), feature=feature)


def _named(plain: datasets.Dataset, values: Sequence[Any], classes: Classes) -> datasets.Dataset:
    from datasets import ClassLabel, List

    if classes.problem == REGRESSION:
        return _with_labels(plain, values, classes)
    feature = ClassLabel(names=list(classes.names))
    if classes.problem == MULTI:
        values = [[at for at, one in enumerate(value) if one] for value in values]
        feature = List(feature)
    return plain.add_column("label", list(values), feature=feature)
