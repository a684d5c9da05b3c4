"""One flat stream of tokens a step: every text of every column in one row, and one forward for all of them.

A batch of a stream holds, under the keys below, what a packed forward needs, and how many texts each column has. Made
with `fit`, it is as long as a few shapes allow: what is missing is filled with texts of padding tokens that nothing
reads, so that a step can be captured once a shape (design: "one graph per step").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Tokens: TypeAlias = "NDArray[np.int32]"
Fit: TypeAlias = Callable[[int], int]
"""From a number to the one it is rounded up to."""

IDS = "stream_input_ids"
POSITIONS = "stream_position_ids"
BOUNDS = "stream_cu_seq_lens"
LONGEST = "stream_max_length"
COLUMNS = "stream_columns"

# Losses of Sentence Transformers that do more with a batch than embed each column once.
COLUMN_BY_COLUMN = {
    "AdaptiveLayerLoss": "it reads the layers between",
    "Matryoshka2dLoss": "it reads the layers between",
    "MegaBatchMarginLoss": "it cuts the batch into mini-batches",
    "CachedMultipleNegativesRankingLoss": "it cuts the batch into mini-batches",
    "CachedMultipleNegativesSymmetricRankingLoss": "it cuts the batch into mini-batches",
    "CachedSpladeLoss": "it cuts the batch into mini-batches",
}


def flatten(
    columns: Sequence[Sequence[Tokens]],
    *,
    position_offset: int = 0,
    filler: int = 0,
    fit: Fit | None = None,
    fit_longest: Fit | None = None,
) -> dict[str, Any]:
    """One stream of all texts, column after column.

    Args:
        columns: Token ids of each text, each column as many texts as it has.
        position_offset: The position of a text's first token (`Packing.position_offset`).
        filler: The token id of the texts that fill the stream up.
        fit: From the number of tokens to the length of the stream; None leaves it as long as it is. Texts that are all
            as long as the bound on them stay as they are: attention has a faster way with those.
        fit_longest: From the longest text's tokens to the bound on it that is handed to attention; None leaves it.

    Returns:
        `stream_input_ids` (1, T) int64; `stream_position_ids` (1, T) int64; `stream_cu_seq_lens` (N + M + 1,) int32
        for N texts and M that fill; `stream_max_length`, an int at least as large as every text; `stream_columns`, the
        number of texts of each column, N together.
    """
    texts = [text for column in columns for text in column]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    total, longest = int(lengths.sum()), int(lengths.max(initial=1))
    bound = longest if fit_longest is None else max(fit_longest(longest), longest)
    whole = bool(texts) and total == len(texts) * bound
    length, fillers = (total, 0) if fit is None or whole else _filled(fit(total), bound, fit)
    spread = np.full(fillers, (length - total) // max(fillers, 1), np.int64)
    spread[: (length - total) - int(spread.sum())] += 1
    lengths = np.concatenate([lengths, spread])
    ids = np.full(length, filler, np.int64)
    if texts:
        np.concatenate(texts, out=ids[:total], casting="safe")
    bounds = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=bounds[1:])
    places = np.arange(length) - np.repeat(bounds[:-1], lengths)
    places[total:] = 0  # a text that fills may be longer than the model has positions
    return {
        IDS: torch.from_numpy(ids)[None],
        POSITIONS: torch.from_numpy(places + position_offset)[None],
        BOUNDS: torch.from_numpy(bounds),
        LONGEST: bound,
        COLUMNS: tuple(len(column) for column in columns),
    }


def _filled(length: int, bound: int, fit: Fit) -> tuple[int, int]:
    """(the stream's length, how many texts fill it) for streams that `fit` takes to `length`.

    Both depend on the shape alone, whatever the gap, and no text that fills is empty: the mean of no tokens is not a
    number, and it would reach the gradients. Hence 64 tokens more than `fit` says.
    """
    low, high = 0, length  # the least total that `fit` takes to `length`, by bisection: `fit` never falls
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) >= length else (middle + 1, high)
    fillers = -(-(length - low + 64) // bound)
    extra = -(-fillers // 64) * 64
    fillers = -(-(length - low + extra) // bound)
    return length + extra, fillers


def fit_eighths(number: int) -> int:
    """Up to the next of eight steps an octave, in multiples of 64: from 512 on at most 12.5% more, 6% on average."""
    step = max(64, 1 << max(0, (number - 1).bit_length() - 4))
    return -(-max(number, 1) // step) * step


def fit_few(number: int) -> int:
    """Up to a multiple of 256 below 2,048, where more tokens take a GPU hardly longer and each shape is to be captured;
    from there on `fit_eighths`."""
    return -(-max(number, 1) // 256) * 256 if number <= 2048 else fit_eighths(number)


def fit_octave(number: int) -> int:
    """Up to the next power of two, 64 or more: kernels skip the blocks past a text's end, so this costs nothing."""
    return max(64, 1 << (max(number, 1) - 1).bit_length())


def fit_within(limit: int, number: int) -> int:
    """Up to the next power of two, but not above the model's limit: texts that are all cut to it stay as they are,
    where filling up would cost up to an eighth more."""
    return max(number, min(limit, fit_octave(number)))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a SentenceTransformer takes as packed features, out of a batch with a stream."""
    bounds, longest = batch[BOUNDS], batch[LONGEST]
    return {
        "input_ids": batch[IDS],
        "position_ids": batch[POSITIONS],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def columns_of(embeddings: Tensor, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """(N + M, D) embeddings of a stream as the finished features of each column: (texts, D) each, fillers left out."""
    return [{"sentence_embedding": part} for part in torch.split(embeddings[: sum(counts)], list(counts))]


def needs_columns(loss: nn.Module) -> str | None:
    """Why `loss`, or a loss inside it, must embed each column itself; None if it takes finished embeddings."""
    for module in loss.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in COLUMN_BY_COLUMN:
                return f"{kind.__name__}: {COLUMN_BY_COLUMN[kind.__name__]}"
    if not type(loss).__module__.startswith(("sentence_transformers.", f"{__package__}.")):
        return f"{type(loss).__name__} is not a loss that Burnish knows"
    return None
