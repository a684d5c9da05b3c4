"""What a user calls their data (a file, a `datasets` folder, a Hub id), made into a stream of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .readers import BadRow, Row, csv_header, csv_rows, jsonl_rows

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

JSONL = (".jsonl", ".ndjson", ".jsonlines", ".json-lines", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
# Rows decoded at a time from Parquet and `datasets`: enough to hide the cost of a call, few enough for any text.
BATCH = 1000

_KINDS = "Use .jsonl, .csv or .tsv (each also .gz), .parquet, a folder written by save_to_disk, or a Hub id owner/name"
_HUB_ID = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data that has been found but not read.

    Args:
        where: What errors call it.
        names: Its columns, or None where only the rows tell (JSON lines).
        rows: Gives the rows with (at least) the named columns, or with all columns for None. Call it once.
        textual: Cells are always text (CSV).
        dataset: The data as a `datasets.Dataset`, where it is one already.
    """

    where: str
    names: tuple[str, ...] | None
    rows: Callable[[Sequence[str] | None], Generator[Row | BadRow, None, None]]
    textual: bool = False
    dataset: datasets.Dataset | None = None


def open_source(source: str | Path, split: str = "train") -> Source:
    """Find `source` and learn its columns.

    Args:
        source: Path of a JSON-lines, CSV, TSV or Parquet file, of a folder that `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk` wrote, or a Hub id: `name`, `owner/name` or `owner/name:config`.
        split: Which split of a `DatasetDict` or a Hub data set; a file has none but "train".

    Raises:
        DataError: It is not there, cannot be read, is of no known format, or has no such split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.exists():
        return _file(path, split)
    if _looks_local(str(source)):
        nearby = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        close = get_close_matches(path.name, nearby, n=1)
        fix = f"Did you mean {path.parent / close[0]}?" if close else f"Check the path, from {Path.cwd()}"
        raise DataError("there is no such file or folder", where=str(source), fix=fix)
    return _hub(str(source), split)


def table_rows(batches: Iterable[Any], names: Sequence[str]) -> Generator[Row, None, None]:
    """The rows of pyarrow tables or record batches, numbered from 1 through all of them."""
    number = 0
    for batch in batches:
        columns = [_cells(batch.column(name)) for name in names]
        for cells in zip(*columns, strict=True):
            number += 1
            yield Row(number, dict(zip(names, cells, strict=True)))


def _cells(column: Any) -> list[Any]:
    try:
        cells: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        cells = [_cell(scalar) for scalar in column]
    return cells


def _cell(scalar: Any) -> Any:
    """One cell; a string that is not UTF-8 comes with lone surrogates for its bad bytes, as from a CSV file."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        scalar = scalar.value if isinstance(scalar, pyarrow.DictionaryScalar) else scalar
        is_string = isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar)
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if is_string else scalar


def _looks_local(source: str) -> bool:
    """Whether a name that is no file was meant as one: Hub ids have at most one slash and no data suffix."""
    suffix = "".join(Path(source).suffixes[-2:]).lower()
    data_file = any(end in suffix for end in (*JSONL, *DELIMITERS, PARQUET, ".gz"))
    first, slash, _ = source.partition("/")
    return (
        data_file
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or (bool(slash) and Path(first).is_dir())
    )


def _file(path: Path, split: str) -> Source:
    where = str(path)
    plain = path.name.lower().removesuffix(".gz")
    suffix = Path(plain).suffix
    if split != "train":
        raise DataError(f"a file has no split '{split}'", where=where, fix="Name that split's own file")
    if suffix in JSONL:
        return Source(where=where, names=None, rows=lambda names: jsonl_rows(path))
    if suffix in DELIMITERS:
        delimiter = DELIMITERS[suffix]
        header = csv_header(path, delimiter)
        return Source(where=where, names=header, rows=lambda names: csv_rows(path, delimiter), textual=True)
    if suffix == PARQUET and path.suffix.lower() == PARQUET:
        return _parquet(path)
    raise DataError(f"'{''.join(path.suffixes)}' is no known format", where=where, fix=_KINDS)


def _parquet(path: Path) -> Source:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    where = str(path)
    if path.stat().st_size == 0:
        raise DataError("file is empty", where=where, fix="Write it again, with at least two rows")
    with _parquet_errors(where):
        header = tuple(parquet.read_schema(path).names)

    def rows(names: Sequence[str] | None) -> Generator[Row, None, None]:
        wanted = list(header if names is None else names)
        with _parquet_errors(where), parquet.ParquetFile(path) as file:
            yield from table_rows(file.iter_batches(BATCH, columns=wanted), wanted)

    return Source(where=where, names=header, rows=rows)


@contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        fix = "Check the file and its permissions, or write it again: it is no Parquet, truncated or damaged"
        raise DataError(f"cannot be read ({_one_line(error)})", where=where, fix=fix) from error


def _folder(path: Path, split: str) -> Source:
    from datasets import DatasetDict, load_from_disk

    where = str(path)
    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        held = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(held[:5]) + (", …" if len(held) > 5 else "") or "nothing"
        what = f"folder was not written by save_to_disk; it holds {shown}"
        raise DataError(what, where=where, fix="Name one file in it, or save the data set with Dataset.save_to_disk")
    try:
        loaded = load_from_disk(where)
    except Exception as error:  # whatever a damaged folder sets off in datasets, json or pyarrow
        what = f"folder cannot be loaded ({_one_line(error)})"
        fix = "Write it again with save_to_disk: it is empty, incomplete or damaged"
        raise DataError(what, where=where, fix=fix) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(f"there is no split '{split}'", where=where, fix=f"Choose one of: {', '.join(loaded)}")
        return _from_dataset(loaded[split], f"{where} ({split})")
    if split not in ("train", str(loaded.split)):
        what = f"the folder holds one data set, not a split '{split}'"
        raise DataError(what, where=where, fix="Name the folder of that split")
    return _from_dataset(loaded, where)


def _hub(source: str, split: str) -> Source:
    from datasets import load_dataset

    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise DataError("is neither a file nor a folder nor a Hub id", where=source, fix=_KINDS)
    try:
        loaded = load_dataset(match["path"], match["config"], split=split)
    except Exception as error:  # the Hub, the network, the cache and the data set's own files: all end here
        raise _hub_error(error, source) from error
    return _from_dataset(loaded, f"{source} ({split})")


def _hub_error(error: Exception, source: str) -> DataError:
    import datasets
    from datasets.exceptions import DatasetNotFoundError  # type: ignore[import-untyped]

    said = _one_line(error)
    if isinstance(error, DatasetNotFoundError):
        fix = "Check the spelling; if it is private or gated, run `hf auth login` and accept its terms"
        return DataError("is no file here and no data set that the Hub shows you", where=source, fix=fix)
    if isinstance(error, ConnectionError) or "OfflineModeIsEnabled" in said:
        if datasets.config.HF_HUB_OFFLINE:
            return DataError("is no file here, and HF_HUB_OFFLINE is set", where=source, fix="Unset it, or name a file")
        return DataError(f"the Hub cannot be reached ({said})", where=source, fix="Check the network, or name a file")
    if "onfig" in said and isinstance(error, ValueError):
        return DataError(said, where=source, fix="Pick a configuration as owner/name:config")
    if "split" in said and isinstance(error, ValueError):
        return DataError(said, where=source, fix="Choose one of the splits that it has")
    fix = "Try `datasets.load_dataset` with it by itself, or save it as JSON lines or Parquet and name that file"
    return DataError(f"cannot be loaded from the Hub ({type(error).__name__}: {said})", where=source, fix=fix)


def _from_dataset(dataset: datasets.Dataset, where: str) -> Source:
    header = tuple(dataset.column_names)

    def rows(names: Sequence[str] | None) -> Generator[Row, None, None]:
        wanted = list(header if names is None else names)
        arrow = dataset.select_columns(wanted).with_format("arrow")
        yield from table_rows(arrow.iter(BATCH), wanted)

    return Source(where=where, names=header, rows=rows, dataset=dataset)


def _one_line(error: Exception, most: int = 300) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"
