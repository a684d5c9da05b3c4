"""Files to rows: JSON lines and separated values, read as a stream, each row with its place in the file.

A fault of one row comes out as a `BadRow`, for the caller to stop at or to count. A fault that leaves the rest of
the file in doubt (a broken gzip stream, a quote that is never closed) raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from .errors import DataError

T = TypeVar("T")

TRUNCATED = "The file is probably truncated: copy or download it again"
TO_UTF8 = "Convert the file to UTF-8, e.g. iconv -f LATIN1 -t UTF-8"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"


class Row(NamedTuple):
    """One row: its number in the source, counted from 1 (for text files the line it starts on), and its cells."""

    number: int
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be trained on.

    Args:
        row: Its number, as in `Row`.
        column: The column at fault, by the source's name, where it is one column's.
        reason: What is wrong, in words that equal faults share.
        detail: What is particular to this row, or "".
        fix: What to do about it.
    """

    row: int
    column: str | None = None
    reason: str
    detail: str = ""
    fix: str

    def error(self, where: str, *, skippable: bool = True) -> DataError:
        """The error that stops at this row; `where` is the source."""
        what = f"{self.reason} ({self.detail})" if self.detail else self.reason
        fix = f"{self.fix}, or leave such rows out with --on-bad-row=skip" if skippable else self.fix
        return DataError(what, where=place(where, self.row, self.column), fix=fix)


def place(where: str, row: int | None = None, column: str | None = None) -> str:
    """`file, row N, column C`, as far as it is known."""
    parts = [where] + ([f"row {row}"] if row is not None else []) + ([f"column {column}"] if column is not None else [])
    return ", ".join(parts)


def jsonl_rows(path: Path) -> Generator[Row | BadRow, None, None]:
    """The rows of a JSON-lines file (UTF-8, gzip if it is called .gz), one object a line; blank lines are no rows."""
    where = str(path)
    with _opened(path) as stream:
        for number, raw in _guarded(stream, where):
            if raw.strip():
                yield _json_row(number, raw, where)


def _json_row(number: int, raw: bytes, where: str) -> Row | BadRow:
    try:
        cells = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        detail = f"byte {raw[error.start]:#04x} at position {error.start + 1}"
        return BadRow(row=number, reason="line is not UTF-8", detail=detail, fix=TO_UTF8)
    except (ValueError, RecursionError) as error:
        if not raw.endswith(b"\n"):
            return BadRow(row=number, reason="last line is cut off: no valid JSON, no line end", fix=TRUNCATED)
        if number == 1 and (raw.lstrip().startswith(b"[") or raw.strip() == b"{"):
            raise DataError("holds one JSON value over many lines", where=where, fix=_ONE_A_LINE) from error
        detail = (
            f"{error.msg.removesuffix(' at')} at character {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        return BadRow(row=number, reason="line is not valid JSON", detail=detail, fix="Mend the line")
    if isinstance(cells, dict):
        return Row(number, cells)
    if number == 1 and isinstance(cells, list) and any(isinstance(cell, dict) for cell in cells):
        raise DataError("holds a JSON array", where=where, fix=_ONE_A_LINE)
    fix = 'Write one {"column": value, …} a line'
    return BadRow(row=number, reason="line is not a JSON object", detail=f"it is a {type(cells).__name__}", fix=fix)


_ONE_A_LINE = "Write one object a line, e.g. jq -c '.[]' old.json > new.jsonl"


def csv_header(path: Path, delimiter: str) -> tuple[str, ...]:
    """The column names of a file of separated values.

    Raises:
        DataError: The header is missing, not UTF-8, names a column twice, or has another delimiter.
    """
    where = str(path)
    with _opened(path) as stream, _decoded(stream) as decoded:
        lines = (line for _, line in _guarded(decoded, where))
        try:
            header = next((cells for cells in csv.reader(lines, delimiter=delimiter, strict=True) if cells), [])
        except csv.Error as error:
            fix = f"Mend the quotes of the header ({error})"
            raise DataError("header cannot be read", where=place(where, 1), fix=fix) from error
    if not header:
        raise DataError("file is empty", where=where, fix="Give it a header line and at least two rows")
    for index, name in enumerate(header):
        column = name.encode("utf-8", "replace").decode()
        if name in header[:index]:
            fix = "Give every column a name of its own"
            raise DataError("column name occurs twice in the header", where=place(where, 1, column), fix=fix)
        if _has_raw_bytes(name):
            raise DataError("column name is not UTF-8", where=place(where, 1, column), fix=TO_UTF8)
    other = next((sign for sign in ",;\t|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    if other is not None:
        fix = "Separate the cells by commas (.csv) or tabs (.tsv)"
        raise DataError(f"cells seem to be separated by {other!r}, not {delimiter!r}", where=place(where, 1), fix=fix)
    return tuple(header)


def csv_rows(path: Path, delimiter: str) -> Generator[Row | BadRow, None, None]:
    """The rows of a file of separated values (UTF-8, gzip if it is called .gz), after its header, cells as `str`.

    Bytes that are not UTF-8 come as lone surrogates (PEP 383), which the row checks report with their column.
    """
    where, header = str(path), csv_header(path, delimiter)
    with _opened(path) as stream, _decoded(stream) as decoded:
        record: list[str] = []  # the physical lines of the row that is being read
        reader = csv.reader(_recorded(decoded, where, record), delimiter=delimiter, strict=True)
        seen_header = False
        while True:
            start = reader.line_num + 1
            record.clear()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield _csv_fault(start, record, error, where, header, delimiter)
                continue
            if cells is None:
                return
            if cells and seen_header:
                yield _csv_row(start, cells, header, cut_off=not record[-1].endswith(("\n", "\r")))
            seen_header = seen_header or bool(cells)


def _csv_row(number: int, cells: list[str], header: Sequence[str], *, cut_off: bool) -> Row | BadRow:
    if len(cells) == len(header):
        return Row(number, dict(zip(header, cells, strict=True)))
    detail = f"{len(cells)} of {len(header)}"
    if len(cells) > len(header):
        fix = "Put cells that hold the delimiter in double quotes"
        return BadRow(row=number, column=header[-1], reason="more cells than the header has", detail=detail, fix=fix)
    fix = f"{TRUNCATED}" if cut_off else "Fill in the missing cells"
    reason = "last line is cut off: fewer cells than the header has" if cut_off else "fewer cells than the header has"
    return BadRow(row=number, column=header[len(cells)], reason=reason, detail=detail, fix=fix)


def _csv_fault(
    number: int, record: list[str], error: csv.Error, where: str, header: Sequence[str], delimiter: str
) -> BadRow:
    """A row whose quotes are wrong: a bad row if it is one line, else raised, for nobody knows what it swallowed."""
    text, limit = "".join(record), csv.field_size_limit()
    if "end of data" in str(error):
        column = _last_column(text, header, delimiter)
        fix = 'Close it and write quotes inside cells as ""; if the file ends there, it is truncated: copy it again'
        raise DataError("a quote is never closed", where=place(where, number, column), fix=fix) from error
    if "field larger" in str(error):
        column = _last_column(text[:limit], header, delimiter)
        what = f"cell is longer than {limit} characters"
        fix = "Close the quote that opens it; if the text is that long, use JSON lines or Parquet"
        raise DataError(what, where=place(where, number, column), fix=fix) from error
    bad = BadRow(row=number, reason="quotes are wrong", detail=str(error), fix='Write a quote inside a cell as ""')
    if len(record) > 1:
        raise BadRow(
            row=number, reason=f"quotes are wrong somewhere down to line {number + len(record) - 1}", fix=bad.fix
        ).error(where, skippable=False) from error
    return bad


def _last_column(text: str, header: Sequence[str], delimiter: str) -> str | None:
    """The column in which `text`, the beginning of a row, ends."""
    cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    return header[len(cells) - 1] if 0 < len(cells) <= len(header) else None


def _decoded(stream: IO[bytes]) -> io.TextIOWrapper:
    # newline="" leaves line ends inside quoted cells as they are; surrogateescape keeps the place of a bad byte.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _has_raw_bytes(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text)


def _recorded(lines: Iterable[str], where: str, record: list[str]) -> Iterator[str]:
    for _, line in _guarded(lines, where):
        record.append(line)
        yield line


def _guarded(lines: Iterable[T], where: str) -> Iterator[tuple[int, T]]:
    """The lines with their numbers from 1; a stream that breaks off is an error that says where."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except EOFError as error:
        what = "compressed file ends in the middle"
        raise DataError(what, where=place(where, number + 1), fix=TRUNCATED) from error
    except (OSError, zlib.error) as error:
        raise DataError(f"cannot be read ({error})", where=place(where, number + 1), fix=_READABLE) from error


_READABLE = "Check the file and its permissions, or copy it again"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if it is called .gz, after a look at its first two."""
    where, packed = str(path), path.name.lower().endswith(".gz")
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            file.seek(0)
            if magic == _GZIP and not packed:
                raise DataError("is compressed with gzip", where=where, fix=f"Call it {path.name}.gz")
            if packed and magic and magic != _GZIP:
                raise DataError("is not a gzip file", where=where, fix=f"Call it {path.name[:-3]}, or compress it")
            if magic in _UTF16:
                fix = "Convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8"
                raise DataError("is UTF-16, not UTF-8", where=where, fix=fix)
            if packed:
                with gzip.open(file) as unpacked:
                    yield cast(IO[bytes], unpacked)
            else:
                yield file
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror or error})", where=where, fix=_READABLE) from error
