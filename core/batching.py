"""Which rows make a batch: no text twice in one, as Sentence Transformers' sampler does it, without reading texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import xxhash
from numpy.typing import NDArray
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from .feeding import format_refusal
from .token_store import texts_in_chunks

_LARGEST_BLOCK = 1 << 16


class NoDuplicates(NoDuplicatesBatchSampler):
    """Sentence Transformers' `NoDuplicatesBatchSampler`, batch for batch, for data sets whose values are texts.

    Each text is hashed once (128 bits) and becomes a number. A batch is the next rows of the epoch's order; those whose
    numbers are taken wait for the next one. 100,000 pairs in batches of 64 on one CPU core: 0.05 s for the numbers,
    once, and 0.06 s an epoch (40 microseconds a batch), against 3.1 s; 0.11 s against 3.1 s where each question comes
    five times. With its own `precompute_hashes` the class takes 0.7 s once, and 0.34 s an epoch.

    Takes what that class takes. `precompute_hashes` and what belongs to it change nothing.
    """

    def __init__(self, *args: Any, precompute_hashes: bool = False, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._numbers: tuple[NDArray[np.int32], NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        if hasattr(NoDuplicatesBatchSampler, "_iter_one_pass"):  # 6.2: it draws again where a pass is too short
            yield from super().__iter__()
            return
        if self.generator and self.seed is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        yield from self._iter_one_pass()

    def _iter_one_pass(self, *_: Any) -> Iterator[list[int]]:
        """The batches of one order of the rows."""
        rows = len(self.dataset)
        dtype = torch.int32 if rows <= np.iinfo(np.int32).max else torch.int64
        order = torch.randperm(rows, generator=self.generator, dtype=dtype).numpy()
        if self._numbers is None:
            self._numbers = text_numbers(self.dataset)
        draw = _Draw(order, *self._numbers)
        while draw.left:
            batch = draw.batch(self.batch_size)
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


def text_numbers(dataset: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(rows, columns): the number of each text, equal where texts are; (rows,): how many different ones a row has."""
    columns = [name for name in dataset.column_names if name != "dataset_name"]
    hashes = [_hashes(texts) for name in columns for texts in texts_in_chunks(dataset, name)]
    every = pa.chunked_array(hashes, pa.binary(16)).dictionary_encode()
    numbers = np.concatenate([np.zeros(0, np.int32), *(chunk.indices.to_numpy() for chunk in every.chunks)])
    table = np.ascontiguousarray(numbers.reshape(len(columns), len(dataset)).T)
    ordered = np.sort(table, axis=1)
    return table, 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)


def _hashes(texts: Any) -> Any:
    data = b"".join(xxhash.xxh3_128_digest(text) for text in texts.cast(pa.large_binary()).to_pylist())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(texts), [None, pa.py_buffer(data)])


class _Draw:
    """One pass over the rows: first those that wait, then the order's next."""

    def __init__(self, order: NDArray[Any], numbers: NDArray[np.int32], different: NDArray[np.int64]) -> None:
        self._order, self._numbers, self._different = order, numbers, different
        self._waiting, self._next = order[:0], 0
        self._taken = np.zeros(int(numbers.max(initial=-1)) + 1, np.bool_)

    @property
    def left(self) -> bool:
        return len(self._waiting) > 0 or self._next < len(self._order)

    def _block(self, size: int) -> NDArray[Any]:
        """The next `size` rows, taken away; fewer at the end."""
        fresh = size - len(self._waiting)
        if fresh <= 0:
            block, self._waiting = self._waiting[:size], self._waiting[size:]
            return block
        block = np.concatenate([self._waiting, self._order[self._next : self._next + fresh]])
        self._waiting, self._next = self._waiting[:0], min(self._next + fresh, len(self._order))
        return block

    def batch(self, size: int) -> list[int]:
        """The next rows with no text twice, at most `size`; the others wait."""
        block = self._block(size)
        if len(block) == size and len(np.unique(self._numbers[block])) == self._different[block].sum():
            return [int(row) for row in block]  # nearly always
        return self._search(size, block)

    def _search(self, size: int, block: NDArray[Any]) -> list[int]:
        chosen: list[int] = []
        passed, width = [], size
        while len(block) and len(chosen) < size:
            stays = self._taken[self._numbers[block]].any(axis=1)
            free = np.flatnonzero(~stays)
            for place, numbers in zip(free.tolist(), self._numbers[block[free]].tolist(), strict=True):
                if len(chosen) == size:
                    stays[place:] = True
                    break
                if self._taken[numbers].any():
                    stays[place] = True
                else:
                    self._taken[numbers] = True
                    chosen.append(int(block[place]))
            passed.append(block[stays])
            if len(chosen) < size:
                width = min(2 * width, _LARGEST_BLOCK)
                block = self._block(width)
        self._taken[self._numbers[chosen]] = False
        self._waiting = np.concatenate([*passed, self._waiting])
        return chosen


def fits(dataset: Any, label_columns: Sequence[str] | None) -> bool:
    """Whether `NoDuplicates` can read a data set: every value, but for labels, is a text that nothing changes."""
    if not hasattr(dataset, "num_rows") or format_refusal(dataset) is not None:
        return False
    if set(dataset.format["columns"]) != set(dataset.column_names):
        return False
    names = [name for name in dataset.column_names if name not in (label_columns or ()) and name != "dataset_name"]
    kinds = {getattr(dataset.features[name], "dtype", None) for name in names}
    return bool(kinds) and kinds <= {"string", "large_string"}
