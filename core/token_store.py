"""Texts tokenised once, in parallel, into memory-mapped Arrow files that later runs find again.

A store holds the token ids of one column of texts. Its name is a hash over the texts themselves, the tokenizer with all
its settings, the prompt and the longest length: a changed text or tokenizer never meets old tokens, and another run or
data set with the same column finds them. Texts are read and written in chunks, so that a data set larger than memory
goes through.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash
from numpy.typing import NDArray

from .errors import DataError
from .stores import Stored, cache_folder, kept, make_room, stores
from .stream import Tokens

if TYPE_CHECKING:
    from .tokenising import Recipe

CHUNK = 16_384
"""Texts in a record batch: what is in memory at a time while a store is written."""
_FORMAT = 1
_FILE = "tokens.arrow"
_SCHEMA = pa.schema([pa.field("tokens", pa.large_list(pa.int32()))])


@dataclass(slots=True)
class TokenColumn:
    """The token ids of one column's texts, in a file that is mapped where they are read. Pickled, it is a path.

    Args:
        path: The Arrow file: one column "tokens" of lists of int32, `CHUNK` texts in each batch.
        seconds: What tokenising took; 0.0 where the file was there.
    """

    path: Path
    seconds: float = 0.0
    _chunks: list[tuple[NDArray[np.int64], Tokens]] | None = None

    def __len__(self) -> int:
        return sum(len(bounds) - 1 for bounds, _ in self._mapped())

    def __getitem__(self, row: int) -> Tokens:
        """(length,) token ids of one text, a view of the file."""
        bounds, values = self._mapped()[row // CHUNK]
        place = row % CHUNK
        return values[bounds[place] : bounds[place + 1]]

    @property
    def tokens(self) -> int:
        """Tokens of all texts together."""
        return sum(int(bounds[-1] - bounds[0]) for bounds, _ in self._mapped())

    def lengths(self) -> NDArray[np.int64]:
        """(texts,) tokens of each text."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(bounds) for bounds, _ in self._mapped())])

    def _mapped(self) -> list[tuple[NDArray[np.int64], Tokens]]:
        if self._chunks is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            chunks = [reader.get_batch(number).column(0) for number in range(reader.num_record_batches)]
            self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        return self._chunks

    def __getstate__(self) -> tuple[Path, float]:
        return self.path, self.seconds  # a loader's worker maps the file itself

    def __setstate__(self, state: tuple[Path, float]) -> None:
        self.path, self.seconds = state
        self._chunks = None


def store_folder(asked: str | os.PathLike[str] | None = None) -> Path:
    """`asked`, else `$BURNISH_CACHE/tokens`, else `$XDG_CACHE_HOME/burnish/tokens`, else `~/.cache/burnish/tokens`.

    Raises:
        ConfigError: If there is no home folder to put it in.
    """
    return cache_folder("token store", "tokens", asked)


def texts_in_chunks(dataset: Any, column: str) -> Iterator[Any]:
    """The texts of a column in the order of its rows, as Arrow arrays of large strings, `CHUNK` at a time.

    Args:
        dataset: A `datasets.Dataset`; whatever its format, the texts are those that it holds.
        column: A column of strings, or of lists of strings, whose texts come one after another.

    Raises:
        DataError: If a text is missing.
    """
    rows = dataset.with_format("arrow", columns=[column])
    held, count = list[Any](), 0  # of lists, what does not fill a chunk yet
    step = CHUNK if getattr(dataset.features[column], "dtype", "") in ("string", "large_string") else CHUNK // 16
    for start in range(0, len(dataset), step):
        found = rows[start : start + step].column(0)
        _check_whole(found, start, column)
        if not is_list(found.type):
            yield _joined([found.cast(pa.large_string())])
            continue
        texts = pc.list_flatten(found)
        _check_whole(texts, start, column, within=pc.list_parent_indices(found))
        held, count = [*held, texts.cast(pa.large_string())], count + len(texts)
        if count >= CHUNK:
            whole = _joined(held)
            ready = count - count % CHUNK
            yield from (whole.slice(place, CHUNK) for place in range(0, ready, CHUNK))
            held, count = [whole.slice(ready)], count - ready
    if count:
        yield _joined(held)


def list_bounds(dataset: Any, column: str) -> NDArray[np.int64]:
    """(rows + 1,): the first text of each row of a column of lists, counted over all rows, and their number."""
    rows = dataset.with_format("arrow", columns=[column])
    parts = [rows[start : start + CHUNK].column(0) for start in range(0, len(dataset), CHUNK)]
    lengths = [np.asarray(pc.list_value_length(part).to_numpy(), np.int64) for part in parts]
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _joined(parts: list[Any]) -> Any:
    """One Arrow array of several, chunked or not."""
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pa.ChunkedArray) else [part])]
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _check_whole(found: Any, start: int, column: str, within: Any = None) -> None:
    """Refuse a text, or a list, that is missing; `within` says which row each text of lists is of."""
    if not found.null_count:
        return
    place = int(np.flatnonzero(found.is_null().to_numpy())[0])
    row = start + (place if within is None else int(within[place].as_py()))
    raise DataError("there is no text", where=f"row {row} of column {column}", fix="Leave the row out")


def content_hash(dataset: Any, column: str) -> str:
    """A hash over the texts of a column in their order, 128 bits, whatever pieces Arrow holds them in."""
    digest = xxhash.xxh3_128()
    for texts in texts_in_chunks(dataset, column):
        _, offsets, data = texts.buffers()
        bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        digest.update(np.diff(bounds).tobytes())  # "ab", "c" and "a", "bc" are other texts
        if data is not None:
            digest.update(memoryview(data)[int(bounds[0]) : int(bounds[-1])])
    return f"{digest.hexdigest()} {len(dataset)}"


def token_column(dataset: Any, column: str, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> TokenColumn:
    """The column's tokens: from their store where there is one, else tokenised into it now.

    Of several processes that want one store at once, one tokenises and the others wait for it.

    Args:
        dataset: A `datasets.Dataset`.
        column: A column of strings, or of lists of strings, which are taken one after another.
        recipe: How they are tokenised.
        folder: Of all stores: from `store_folder`.
        say: Told, in one line, of a damaged store or of deleted ones.

    Raises:
        ConfigError: If the folder cannot be written to.
        BurnishError: If the disk is full.
        DataError: If a text is missing.
    """
    key = xxhash.xxh3_128_hexdigest(f"{_FORMAT} {content_hash(dataset, column)} {recipe.key}".encode())

    def make(file: Path) -> dict[str, Any]:
        return _write(dataset, column, recipe, file)

    again = "its texts are tokenised again"
    return TokenColumn(*kept(folder, key, _FILE, make, say=say, kind="token stores", again=again))


def _write(dataset: Any, column: str, recipe: Recipe, file: Path) -> dict[str, Any]:
    tokens = written = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for texts in texts_in_chunks(dataset, column):
            values, lengths = recipe.tokenise(texts.to_pylist())
            bounds = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(lengths, out=bounds[1:])
            lists = pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(values))
            writer.write_batch(pa.record_batch([lists], schema=_SCHEMA))
            tokens, written = tokens + len(values), written + len(texts)
    about = {"texts": written, "tokens": tokens}
    return {**about, "column": column, "tokenizer": recipe.name, "prompt": recipe.prompt, "longest": recipe.max_length}


__all__ = [
    "CHUNK",
    "Stored",
    "TokenColumn",
    "content_hash",
    "is_list",
    "list_bounds",
    "make_room",
    "store_folder",
    "stores",
    "texts_in_chunks",
    "token_column",
]
