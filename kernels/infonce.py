"""InfoNCE with in-batch negatives, tile by tile: the matrix of scores is never held.

Plain PyTorch, and no Triton: a tile costs four products of R x C x D (one forward; in the backward the scores again and
one for each gradient), 8 R C D operations, and about 15 passes over R x C numbers for maxima, exponentials and sums, 60
R C bytes. At D = 1024 in float32 that is 137 operations a byte, and an H100 does 67 Tera-operations a second in float32
with 3.35 TB/s, 20 operations a byte: the products are 87% of the time, and they are cuBLAS's either way. (Where TF32 is
allowed, which is not so by default, products and passes take about as long as each other.)

B: queries of this process, W: queries of all processes (W = B with one), D: embedding size, R x C: a tile of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE_BYTES = 64 * 2**20  # 4096 x 4096 in float32: enough for a GPU's products, little of its memory
CPU_TILE_BYTES = 4 * 2**20  # stays in the cache: 4096 x 4096 x 384 on one core takes 0.75 s, with 64 MiB 0.86 s
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def tiled_infonce(
    queries: Tensor,
    documents: Sequence[Tensor],
    *,
    scale: float = 20.0,
    similarity: str = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    offset: int = 0,
    rows: int | None = None,
    tile_bytes: int | None = None,
) -> Tensor:
    """The InfoNCE loss of each query (van den Oord et al. 2018, equation 4): log Z_i - score(q_i, d_i).

    Z_i sums the exponentials of the scores of the chosen directions (Li et al. 2023, section 3.2): of the query to all
    documents, to all other queries; of its document to all queries, to all documents of other queries. Scores are
    similarities times `scale`; those of negatives may grow by `hardness_strength` times their similarity, held constant
    (Lan et al. 2025, equation 5). Names are those of Sentence Transformers' MultipleNegativesRankingLoss, whose mean
    this is.

    Products are float32, or float64 for float64 input, also for half-precision input and under autocast. On CUDA a
    float32 product is what `torch.backends.cuda.matmul` says it is: with TF32 allowed, scores carry 10 bits of
    mantissa, an error of about `scale` / 2000, as they do in the dense loss. By default it is not allowed.

    Memory beyond inputs and their gradients: one tile, and for "cosine" the normalised embeddings with their gradients;
    for half-precision input all of these in float32.
    No shape depends on data and nothing waits for the device.

    Args:
        queries: (W, D), floating.
        documents: The positives (W, D), row i belonging to query i; then hard negatives, (W, D) each, if any.
        scale: Factor on similarities, the inverse of the temperature. Positive.
        similarity: "cosine" or "dot".
        directions: Of `DIRECTIONS`, "query_to_doc" among them.
        partition_mode: "joint", one sum over all directions; or "per_direction", a sum for each and the mean of their
            logarithms, for the directions that score the positive.
        hardness_mode: Which scores of "query_to_doc" grow: None, those of other queries' documents
            ("in_batch_negatives"), those of the query's own hard negatives ("hard_negatives"), or both
            ("all_negatives").
        hardness_strength: By how much. Not negative.
        offset: The first query whose loss is computed: where this process's begin.
        rows: B, how many there are; None means all.
        tile_bytes: Bytes of a tile; None means `TILE_BYTES`, on a CPU `CPU_TILE_BYTES`.

    Returns:
        (B,) float32, or float64 for float64 input.

    Raises:
        ValueError: If a parameter is none of the above.
    """
    _check(queries, documents, scale, similarity, directions, partition_mode, hardness_mode, hardness_strength)
    own = slice(offset, offset + (queries.shape[0] if rows is None else rows))
    with torch.autocast(queries.device.type, enabled=False):
        wide = _wide(queries.dtype)
        queries, documents = queries.to(wide), [column.to(wide) for column in documents]
        if similarity == "cosine":
            queries, *documents = (functional.normalize(column, dim=-1) for column in (queries, *documents))
        ours, positives = queries[own], documents[0][own]
        strength = 0.0 if hardness_mode is None else hardness_strength
        sums: dict[str, list[Tensor]] = {}

        def add(direction: str, left: Tensor, right: Tensor, others: float, same: float | None) -> None:
            if direction in directions:
                part = tiled_logsumexp(
                    left, right, factor=others, slope=scale, diagonal=offset, on_diagonal=same, tile_bytes=tile_bytes
                )
                sums.setdefault(direction, []).append(part)

        # With all queries and no weighting, those of a document to all queries are the transpose of the others.
        transposed = "doc_to_query" in directions and len(ours) == len(queries)
        transposed = transposed and _factors(0, hardness_mode, scale, strength) == (scale, scale)
        for place, column in enumerate(documents):
            others, same = _factors(place, hardness_mode, scale, strength)
            if place == 0 and transposed:
                by_query, by_document = tiled_logsumexps(queries, column, factor=scale, tile_bytes=tile_bytes)
                sums |= {"query_to_doc": [by_query], "doc_to_query": [by_document]}
            else:
                add("query_to_doc", ours, column, others, same)
            add("doc_to_doc", positives, column, scale, None)
        add("query_to_query", ours, queries, scale, None)
        if not transposed:
            add("doc_to_query", positives, queries, scale, scale)
        scores = (ours * positives).sum(-1) * scale
        if partition_mode == "joint":
            return _joined([part for parts in sums.values() for part in parts]) - scores
        return torch.stack([_joined(parts) for parts in sums.values()]).mean(0) - scores


def tiled_logsumexp(
    rows: Tensor,
    columns: Tensor,
    *,
    factor: float,
    slope: float,
    diagonal: int = 0,
    on_diagonal: float | None = None,
    tile_bytes: int | None = None,
) -> Tensor:
    """log sum_j exp(f_ij a_i . b_j), with f one number everywhere but on a diagonal; the gradient takes f for `slope`.

    Args:
        rows: (B, D) floating, the a_i.
        columns: (M, D) of the same dtype, the b_j.
        factor: f off the diagonal.
        slope: What f counts as in the gradient: the part of it that is not held constant.
        diagonal: The diagonal is j - i = `diagonal`.
        on_diagonal: f on it; None leaves its cells out.
        tile_bytes: Bytes of a tile of scores; None as in `tiled_infonce`.

    Returns:
        (B,) float32, or float64 for float64 input; -inf where no cell is left. For the backward only it and the inputs
        are kept.
    """
    settings = (factor, diagonal, on_diagonal, _bytes(tile_bytes, rows))
    result: Tensor = _LogSumExp.apply(rows, columns, slope, settings)  # type: ignore[no-untyped-call]
    return result


def tiled_logsumexps(
    rows: Tensor, columns: Tensor, *, factor: float, tile_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(f a_i . b_j) and log sum_i exp(f a_i . b_j) from the same tiles: four products, not eight.

    Both directions of 4096 pairs of 384 on one CPU core, forward and backward: 0.82 s, one after the other 1.60 s.

    Args:
        rows, columns, factor, tile_bytes: As in `tiled_logsumexp`.

    Returns:
        (B,) and (M,).
    """
    settings = (factor, 0, factor, _bytes(tile_bytes, rows) // 2)  # a tile is held twice
    by_row, by_column = _LogSumExps.apply(rows, columns, settings)  # type: ignore[no-untyped-call]
    return by_row, by_column


_Settings: TypeAlias = tuple[float, int, float | None, int]
"""(factor, diagonal, on_diagonal, tile_bytes)"""


class _LogSumExp(torch.autograd.Function):
    """See `tiled_logsumexp`. Maxima and sums run along with the tiles (Milakov and Gimelshein 2018, algorithm 3)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, slope: float, settings: _Settings) -> Tensor:
        out = torch.empty(rows.shape[0], dtype=_wide(rows.dtype), device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for low, high, tiles in _tiles(rows, columns, *settings):
                top, total = _nothing(out[low:high])
                for _, _, scores in tiles:
                    _add(top, total, scores, 1, scores)
                out[low:high] = top + total.log()
        ctx.save_for_backward(rows, columns, out)
        ctx.slope, ctx.settings = slope, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, out = ctx.saved_tensors
        for_rows, for_columns = ctx.needs_input_grad[:2]
        wide, base, share = out.dtype, _finite(out), grad * ctx.slope
        row_grad = torch.zeros_like(rows, dtype=wide) if for_rows else None
        column_grad = torch.zeros_like(columns, dtype=wide) if for_columns else None
        with torch.autocast(rows.device.type, enabled=False):
            for low, high, tiles in _tiles(rows, columns, *ctx.settings):
                # A row's share of the gradient is put on (R, D) before and after, not on (R, C) between.
                weighted = rows[low:high].to(wide) * share[low:high, None]
                for first, last, scores in tiles:
                    weights = scores.sub_(base[low:high, None]).exp_()
                    if row_grad is not None:
                        row_grad[low:high].addmm_(weights, columns[first:last].to(wide))
                    if column_grad is not None:
                        column_grad[first:last].addmm_(weights.T, weighted)
                if row_grad is not None:
                    row_grad[low:high].mul_(share[low:high, None])
        narrow = (None if made is None else made.to(rows.dtype) for made in (row_grad, column_grad))
        return *narrow, None, None


class _LogSumExps(torch.autograd.Function):
    """See `tiled_logsumexps`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        wide = _wide(rows.dtype)
        by_row = torch.empty(rows.shape[0], dtype=wide, device=rows.device)
        column_top, column_total = _nothing(torch.empty(columns.shape[0], dtype=wide, device=rows.device))
        with torch.autocast(rows.device.type, enabled=False):
            for low, high, tiles in _tiles(rows, columns, *settings):
                top, total = _nothing(by_row[low:high])
                spare = None
                for first, last, scores in tiles:
                    spare = torch.empty_like(scores) if spare is None or spare.shape != scores.shape else spare
                    _add(top, total, scores, 1, spare)
                    _add(column_top[first:last], column_total[first:last], scores, 0, scores)
                by_row[low:high] = top + total.log()
        by_column = column_top + column_total.log()
        ctx.save_for_backward(rows, columns, by_row, by_column)
        ctx.settings = settings
        return by_row, by_column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_share: Tensor, column_share: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, by_row, by_column = ctx.saved_tensors
        wide, slope = by_row.dtype, ctx.settings[0]
        row_share, column_share = row_share * slope, column_share * slope
        row_grad, column_grad = torch.zeros_like(rows, dtype=wide), torch.zeros_like(columns, dtype=wide)
        with torch.autocast(rows.device.type, enabled=False):
            for low, high, tiles in _tiles(rows, columns, *ctx.settings):
                left = rows[low:high].to(wide)
                spare = None
                for first, last, scores in tiles:
                    spare = torch.empty_like(scores) if spare is None or spare.shape != scores.shape else spare
                    torch.sub(scores, by_row[low:high, None], out=spare)
                    weights = scores.sub_(by_column[first:last]).exp_().mul_(column_share[first:last])
                    weights.addcmul_(spare.exp_(), row_share[low:high, None])
                    row_grad[low:high].addmm_(weights, columns[first:last].to(wide))
                    column_grad[first:last].addmm_(weights.T, left)
        return row_grad.to(rows.dtype), column_grad.to(columns.dtype), None


def _nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and the sum, relative to it, of no cells yet."""
    return torch.full_like(like, -torch.inf), torch.zeros_like(like)


def _add(top: Tensor, total: Tensor, scores: Tensor, along: int, room: Tensor) -> None:
    """Take a tile into running maxima and sums, in place; `room`, of the tile's shape, is overwritten."""
    higher = torch.maximum(top, scores.amax(along))
    base = _finite(higher)
    parts = torch.sub(scores, base.unsqueeze(along), out=room).exp_().sum(along)
    total.mul_((top - base).exp()).add_(parts)
    top.copy_(higher)


def _tiles(
    rows: Tensor, columns: Tensor, factor: float, diagonal: int, on_diagonal: float | None, tile_bytes: int
) -> Iterator[tuple[int, int, Iterator[tuple[int, int, Tensor]]]]:
    """For each span of rows (low, high, its tiles); each tile is (first, last, (R, C) scores to be overwritten).

    All tiles lie in one buffer, so that one must be done with before the next is asked for.
    """
    wide = _wide(rows.dtype)
    height, width = _tile_shape(rows.shape[0], columns.shape[0], tile_bytes // wide.itemsize)
    buffer = torch.empty(height * width, dtype=wide, device=rows.device)

    def across(low: int, high: int) -> Iterator[tuple[int, int, Tensor]]:
        left = rows[low:high].to(wide)
        for first in range(0, columns.shape[0], width):
            last = min(first + width, columns.shape[0])
            scores = buffer[: (high - low) * (last - first)].view(high - low, last - first)
            torch.addmm(scores, left, columns[first:last].to(wide).T, beta=0, alpha=factor, out=scores)
            line = diagonal + low - first
            if low - high < line < last - first:
                cells = scores.diagonal(line)
                if on_diagonal is None:
                    cells.fill_(-torch.inf)
                elif on_diagonal != factor:
                    cells.mul_(on_diagonal / factor)
            yield first, last, scores

    for low in range(0, rows.shape[0], height):
        high = min(low + height, rows.shape[0])
        yield low, high, across(low, high)


def _tile_shape(rows: int, columns: int, cells: int) -> tuple[int, int]:
    """(R, C) with at most `cells` cells: a square, or longer where one side is short."""
    side = max(1, int(cells**0.5))
    height, width = min(rows, side), min(columns, side)
    return max(1, min(rows, cells // max(width, 1))), max(1, min(columns, cells // max(height, 1)))


def _factors(place: int, mode: str | None, scale: float, strength: float) -> tuple[float, float]:
    """What the similarities of queries to the documents of one column are multiplied by: (other queries', own)."""
    grown = scale + strength
    others = grown if mode in ("in_batch_negatives", "all_negatives") else scale
    same = grown if place > 0 and mode in ("hard_negatives", "all_negatives") else scale
    return others, same


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The logarithm of a sum from the logarithms of its parts, (B,) each."""
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(list(parts)), 0)


def _finite(maxima: Tensor) -> Tensor:
    """0 in place of -inf, which a row without cells has: -inf less itself would be no number."""
    return maxima.masked_fill(maxima == -torch.inf, 0.0)


def _bytes(asked: int | None, near: Tensor) -> int:
    """Bytes of a tile."""
    if asked is not None:
        return asked
    return CPU_TILE_BYTES if near.device.type == "cpu" else TILE_BYTES


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    queries: Tensor, documents: Sequence[Tensor], scale: float, similarity: str, directions: Sequence[str],
    partition_mode: str, hardness_mode: str | None, hardness_strength: float,
) -> None:  # fmt: skip
    if not documents or any(column.shape != queries.shape for column in documents):
        shapes = [tuple(column.shape) for column in documents]
        raise ValueError(f"documents have the shapes {shapes}; each must have the queries' {tuple(queries.shape)}")
    if not set(directions) <= set(DIRECTIONS) or "query_to_doc" not in directions:
        raise ValueError(f"directions={directions!r}: they are of {DIRECTIONS}, and query_to_doc is one of them")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"partition_mode={partition_mode!r} is neither 'joint' nor 'per_direction'")
    if partition_mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
        raise ValueError("partition_mode='per_direction' takes only directions that score the positive")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity={similarity!r} is neither 'cosine' nor 'dot'")
    if hardness_mode not in HARDNESS_MODES or hardness_strength < 0:
        raise ValueError(f"hardness_mode={hardness_mode!r} with hardness_strength={hardness_strength} is not known")
    if not scale > 0:
        raise ValueError(f"scale={scale} is not positive")
