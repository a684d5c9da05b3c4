"""Training data: from what the user calls it to a checked `datasets.Dataset` in the order the losses expect.

Everything is checked here, row by row, before a model is loaded. Rows are streamed: a text file is held once, as
Arrow; a `datasets` folder or a Hub data set stays memory-mapped on disk.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .columns import SCORED, Columns, detect_columns, refine_kind
from .errors import ConfigError, DataError
from .readers import BadRow, Row, place
from .sources import Source, open_source
from .validation import GoodRow, Labels, RowChecker, label_faults

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from numpy.typing import NDArray

__all__ = ["BadRow", "LoadedData", "Row", "load_dataset", "read_rows"]

# How many bad rows are kept with their reasons; all are counted.
KEPT_BAD_ROWS = 1000
# An Arrow batch is closed at this many rows or characters: well below the 2 GiB that one string array can hold.
BATCH_ROWS, BATCH_CHARS = 10_000, 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedData:
    """A data set that passed all checks.

    Args:
        dataset: The text columns in loss order, then the label (int64, or float64 for kind `scored`).
        columns: What each column is for, by the names that `dataset` has.
        source: What it was loaded from, as the user called it.
        skipped: The first 1000 rows that were left out, in the order found.
        skipped_counts: ("reason (column)", how many rows) for all rows left out, the most frequent first.
    """

    dataset: datasets.Dataset
    columns: Columns
    source: str
    skipped: tuple[BadRow, ...] = ()
    skipped_counts: tuple[tuple[str, int], ...] = ()

    @property
    def num_skipped(self) -> int:
        """How many rows were left out."""
        return sum(count for _, count in self.skipped_counts)

    def summary(self) -> str:
        """One line for the user: rows, columns, and what was left out."""
        line = f"{self.source}: {len(self.dataset):,} rows of {', '.join(self.columns.names)} ({self.columns.kind})"
        if self.columns.ignored:
            line += f"; columns left out: {', '.join(name or '(no name)' for name in self.columns.ignored)}"
        if self.skipped_counts:
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.skipped_counts)
            line += f"; rows skipped: {self.num_skipped:,} ({reasons})"
        return line


def read_rows(source: str | Path, split: str = "train") -> Iterator[Row | BadRow]:
    """The rows of `source` with all their columns, unchecked; lines that are no row come as `BadRow`.

    Raises:
        DataError: See `open_source`; also while iterating, where the file breaks off.
    """
    return open_source(source, split).rows(None)


def load_dataset(
    source: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    max_rows: int | None = None,
) -> LoadedData:
    """Read, check and order a training set.

    Args:
        source: A .jsonl, .csv, .tsv (each also .gz) or .parquet file, a folder written by `save_to_disk`, or a Hub
            id (`owner/name`, `owner/name:config`).
        split: The split of a `datasets` folder or Hub data set.
        columns: {role: column of the source}, where the names do not tell; see `detect_columns`.
        on_bad_row: "stop" raises at the first bad row; "skip" leaves bad rows out and counts them.
        max_rows: Stop reading after this many good rows (at least 2).

    Raises:
        ConfigError: An option has a value it cannot have.
        DataError: The source cannot be read, its columns fit no loss, a row is bad (with "stop"), fewer than two
            rows are good, or the set as a whole cannot be trained on.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"'{on_bad_row}' is not a way to go on", where="on_bad_row", fix="Use stop or skip")
    if max_rows is not None and max_rows < 2:
        raise ConfigError(f"{max_rows} rows are too few", where="max_rows", fix="Use 2 or more, or leave it out")
    opened = open_source(source, split)
    log = _Log(opened.where, stop=on_bad_row == "stop")
    found, checker, rows = _start(opened, columns, log)
    texts = None if opened.dataset is not None else _Texts(found.texts)
    numbers, labels = array("q"), Labels()
    with closing(rows):
        for good in _good_rows(rows, checker, log):
            numbers.append(good.number)
            if good.label is not None:
                labels.append(good.label)
            if texts is not None:
                texts.append(good.texts)
            if len(numbers) == max_rows:
                break
    found = refine_kind(found, labels.values)
    late = dict(label_faults(found, labels.values))
    for index, fault in late.items():
        log.reject(fault.at(numbers[index], found.source(found.names[-1])))
    keep: Sequence[int] = range(len(numbers))
    if late:
        keep = [index for index in keep if index not in late]
    if len(keep) < 2:
        raise log.too_few(len(keep))
    checker.finish(opened.where, [labels.values[index] for index in keep] if late else labels.values)
    if texts is not None:
        dataset = texts.dataset(found, labels)
    else:
        dataset = _ordered(opened.dataset, found, labels, numbers)
        keep = [numbers[index] - 1 for index in keep] if log.counts else keep
    return LoadedData(
        dataset=_selected(dataset, keep),
        columns=found,
        source=str(source),
        skipped=tuple(log.kept),
        skipped_counts=tuple(log.counts.most_common()),
    )


class _Log:
    """The bad rows so far, or, with `stop`, the place where the first one raises."""

    def __init__(self, where: str, *, stop: bool) -> None:
        self.where, self.stop = where, stop
        self.kept: list[BadRow] = []
        self.counts: Counter[str] = Counter()

    def reject(self, bad: BadRow) -> None:
        if self.stop:
            raise bad.error(self.where)
        if len(self.kept) < KEPT_BAD_ROWS:
            self.kept.append(bad)
        self.counts[f"{bad.reason} ({bad.column})" if bad.column is not None else bad.reason] += 1

    def too_few(self, good: int) -> DataError:
        """The error for a set of fewer than two good rows, which has nothing to compare a text with."""
        if not self.kept:
            what = "has only one row" if good else "is empty: it has no rows"
            return DataError(what, where=self.where, fix="Give it at least two rows")
        first, total = self.kept[0], good + self.counts.total()
        what = f"only {good} of {total} rows can be used; this is the first that cannot: {first.reason}"
        return DataError(what, where=place(self.where, first.row, first.column), fix=first.fix)


def _start(
    opened: Source, mapping: Mapping[str, str] | None, log: _Log
) -> tuple[Columns, RowChecker, Generator[Row | BadRow, None, None]]:
    """Find out the columns (in JSON lines: from the first row that is one) and start reading."""
    if opened.names is not None:
        found = detect_columns(opened.names, opened.where, mapping)
        rows = opened.rows([found.source(name) for name in found.names])
        return found, RowChecker(found, textual=opened.textual), rows
    rows = opened.rows(None)
    for item in rows:
        if isinstance(item, BadRow):
            log.reject(item)
            continue
        names = list(item.cells)
        found = detect_columns(names, opened.where, mapping)
        return found, RowChecker(found, names=None if mapping else names), _before(item, rows)
    raise log.too_few(0)


def _before(first: Row, rows: Generator[Row | BadRow, None, None]) -> Generator[Row | BadRow, None, None]:
    with closing(rows):
        yield first
        yield from rows


def _good_rows(rows: Iterable[Row | BadRow], checker: RowChecker, log: _Log) -> Iterator[GoodRow]:
    for item in rows:
        checked = item if isinstance(item, BadRow) else checker.check(item)
        if isinstance(checked, BadRow):
            log.reject(checked)
        else:
            yield checked


class _Texts:
    """Columns of text that grow as Arrow batches, so that a large file is in memory once and not as Python strings."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._open: list[list[str]] = [[] for _ in names]
        self._chars = 0
        self._batches: list[Any] = []
        self._hash = hashlib.blake2b(repr(self._names).encode(), digest_size=8)

    def append(self, texts: Sequence[str]) -> None:
        for column, text in zip(self._open, texts, strict=True):
            column.append(text)
            self._chars += len(text)
        if len(self._open[0]) >= BATCH_ROWS or self._chars >= BATCH_CHARS:
            self._close_batch()

    def _close_batch(self) -> None:
        import pyarrow  # type: ignore[import-untyped]

        arrays = [pyarrow.array(column, pyarrow.string()) for column in self._open]
        self._batches.append(pyarrow.RecordBatch.from_arrays(arrays, self._names))
        self._hash.update(self._batches[-1].serialize())
        self._open, self._chars = [[] for _ in self._names], 0

    def dataset(self, columns: Columns, labels: Labels) -> datasets.Dataset:
        import pyarrow
        from datasets import Dataset

        self._close_batch()
        table = pyarrow.Table.from_batches(self._batches)
        if columns.label is not None:
            values = _label_array(columns, labels.values)
            self._hash.update(values.tobytes())
            table = table.append_column(columns.label, pyarrow.array(values))
        # Without a fingerprint of ours, Dataset would pickle the whole table, a second copy, to compute its own.
        return Dataset(table, fingerprint=self._hash.hexdigest())


def _label_array(columns: Columns, labels: Any) -> NDArray[Any]:
    import numpy as np

    return np.asarray(labels, dtype=np.float64 if columns.kind == SCORED else np.int64)


def _ordered(dataset: datasets.Dataset, columns: Columns, labels: Labels, numbers: Sequence[int]) -> datasets.Dataset:
    """The columns of `dataset` in loss order, by their new names; the texts stay where they are on disk."""
    import numpy as np

    sources = {columns.source(name): name for name in columns.names}
    dataset = dataset.with_format(None).select_columns(list(sources))
    if columns.label is not None:
        source = columns.source(columns.label)
        values = np.zeros(len(dataset), _label_array(columns, []).dtype)
        if str(dataset.data.schema.field(source).type) != {"int64": "int64", "float64": "double"}[str(values.dtype)]:
            values[np.asarray(numbers) - 1] = _label_array(columns, labels.values)
            dataset = dataset.remove_columns(source).add_column(source, values)
    renamed = {source: name for source, name in sources.items() if source != name}
    return dataset.rename_columns(renamed) if renamed else dataset


def _selected(dataset: datasets.Dataset, keep: Sequence[int]) -> datasets.Dataset:
    if len(keep) == len(dataset):
        return dataset
    return dataset.select(range(len(keep)) if keep[-1] == len(keep) - 1 else keep)
