# mypy: disable-error-code="no-untyped-def"
# The arguments of these functions are Triton's pointers, numbers and tiles, which Python has no types for.
"""The tiles of `biased_attention`: tiled attention with a running softmax, and a backward that computes weights again
(Dao 2023, algorithms 1 and 2).

Scores are kept in units of log2, so that a weight is one exp2: `scale` and the bias come multiplied by log2(e).
Nothing is added atomically, so that results do not depend on timing.

Names: `start` and `length`, a text's first token and its tokens; `rows` are queries, `columns` keys, both counted from
the text's start; `longest`, the most tokens of a text; HEADS, query heads; SHARE, query heads to a key head; SIZE, a
head's size, padded to PADDED; ROWS and COLUMNS, a tile's size; THRESHOLD, 2^32 times dropout's probability;
`inflation`, what kept weights are multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from .dropout import columns_of, keeps, numbers_of

jit: Callable[[Any], Any] = triton.jit
# Numbers that differ from batch to batch: Triton would compile once more for 1 and once for multiples of 16.
kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["tokens", "longest", "window", "texts", "splits"])


@jit
def _place(bounds, longest, heads, BLOCK: tl.constexpr):
    """(first token, tokens, head, first row of its block) of a program. Blocks of one head of one text lie together."""
    program = tl.program_id(0)
    many = tl.cdiv(longest, BLOCK)
    text = program // (many * heads)
    start = tl.load(bounds + text).to(tl.int64)
    length = (tl.load(bounds + text + 1) - start).to(tl.int32)
    return start, length, (program // many) % heads, (program % many) * BLOCK


@jit
def _rows(base, rows, stride, length, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """A (rows, PADDED) tile; 0 past the text's end and past the head's size."""
    columns = tl.arange(0, PADDED)
    seen = (rows < length)[:, None] & (columns < SIZE)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=seen, other=0.0)


@jit
def _write(base, tile, rows, stride, length, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`tile` to where `_rows` would read it from."""
    columns = tl.arange(0, PADDED)
    seen = (rows < length)[:, None] & (columns < SIZE)[None, :]
    place = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=seen)


@jit
def _seed(numbers, head, start, tokens, HEADS: tl.constexpr):
    """What a head's columns of one text are numbered from; it stands after two numbers for each head and token."""
    return tl.load(numbers + 2 * HEADS * tokens + head).to(tl.uint32, bitcast=True) + start.to(tl.uint32)


@jit
def _visible(
    scores, bias, row, column, length, window,
    BIASED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Scores plus bias, and -inf where the query of `row` does not see the key of `column`.

    `row` and `column` broadcast to the scores' shape. Places past the text's end read the bias of its last token, so
    that the table is never left.
    """
    if BIASED:
        scores += tl.load(bias + (tl.minimum(column, length - 1) - tl.minimum(row, length - 1))).to(tl.float32)
    if MASKED:
        hidden = column >= length
        if CAUSAL:
            hidden = hidden | (column > row)
        if WINDOWED:
            hidden = hidden | (row - column >= window) | (column - row >= window)
        scores = tl.where(hidden, float("-inf"), scores)
    return scores


@jit
def _keys(
    first, length, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """(start, end of the tiles that need no mask, end) of the keys that `ROWS` queries from `first` on may see."""
    low = 0
    full = length // COLUMNS * COLUMNS
    high = length
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // COLUMNS * COLUMNS)
        high = tl.minimum(high, first + ROWS)
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // COLUMNS * COLUMNS
        full = low
        high = tl.minimum(high, first + ROWS + window - 1)
    return low, full, high


@kernel
def forward(
    query, key, value, bias, bounds, numbers, out, log_sum,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    tokens, longest, scale, window, inflation,
    HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The output of one block of queries, and log2 of each row's sum of weights for the backward."""
    start, length, head, first = _place(bounds, longest, HEADS, ROWS)
    if first >= length:
        return
    query += start * query_stride + head * query_head
    key += start * key_stride + head // SHARE * key_head
    value += start * value_stride + head // SHARE * value_head
    bias += head * (2 * longest - 1) + longest - 1
    rows = first + tl.arange(0, ROWS)
    q = _rows(query, rows, query_stride, length, SIZE, PADDED)
    slope = rows
    offset = rows
    seed = head
    if THRESHOLD > 0:
        seed = _seed(numbers, head, start, tokens, HEADS)
        numbers += head * tokens + start
        slope = numbers_of(numbers, rows, length)
        offset = numbers_of(numbers + HEADS * tokens, rows, length)

    # Finite, so that a tile of hidden keys before a row's first seen one leaves no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, PADDED], tl.float32)
    low, full, high = _keys(first, length, window, ROWS, COLUMNS, CAUSAL, WINDOWED)
    for masked in tl.static_range(2):
        for begin in range(full if masked else low, high if masked else full, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            k = _rows(key, columns, key_stride, length, SIZE, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = _visible(
                scores, bias, rows[:, None], columns[None, :], length, window, BIASED, masked == 1, CAUSAL, WINDOWED
            )
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, 1)
            if THRESHOLD > 0:
                kept = keeps(slope[:, None], offset[:, None], columns_of(seed, columns)[None, :], THRESHOLD)
                weights = tl.where(kept, weights, 0.0)
            v = _rows(value, columns, value_stride, length, SIZE, PADDED)
            found = tl.dot(weights.to(v.dtype), v, found * shrink[:, None], input_precision=PRECISION)
            peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)  # a row whose every bias is -inf comes out as 0
    found *= (inflation / total)[:, None]
    _write(out + (start * HEADS + head) * SIZE, found, rows, HEADS * SIZE, length, SIZE, PADDED)
    tl.store(log_sum + head * tokens + start + rows, peak + tl.log2(total), mask=rows < length)


@kernel
def query_gradient(
    query, key, value, bias, bounds, numbers, out, log_sum, grad, delta, grad_query,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    tokens, longest, scale, window, inflation,
    HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and `delta`, each row's sum of output times its gradient."""
    start, length, head, first = _place(bounds, longest, HEADS, ROWS)
    if first >= length:
        return
    query += start * query_stride + head * query_head
    key += start * key_stride + head // SHARE * key_head
    value += start * value_stride + head // SHARE * value_head
    bias += head * (2 * longest - 1) + longest - 1
    own = (start * HEADS + head) * SIZE
    rows = first + tl.arange(0, ROWS)
    q = _rows(query, rows, query_stride, length, SIZE, PADDED)
    dout = _rows(grad + own, rows, HEADS * SIZE, length, SIZE, PADDED)
    o = _rows(out + own, rows, HEADS * SIZE, length, SIZE, PADDED)
    row_delta = tl.sum(o.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta + head * tokens + start + rows, row_delta, mask=rows < length)
    row_log = tl.load(log_sum + head * tokens + start + rows, mask=rows < length, other=float("inf"))
    slope = rows
    offset = rows
    seed = head
    if THRESHOLD > 0:
        seed = _seed(numbers, head, start, tokens, HEADS)
        numbers += head * tokens + start
        slope = numbers_of(numbers, rows, length)
        offset = numbers_of(numbers + HEADS * tokens, rows, length)

    found = tl.zeros([ROWS, PADDED], tl.float32)
    low, full, high = _keys(first, length, window, ROWS, COLUMNS, CAUSAL, WINDOWED)
    for masked in tl.static_range(2):
        for begin in range(full if masked else low, high if masked else full, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            k = _rows(key, columns, key_stride, length, SIZE, PADDED)
            v = _rows(value, columns, value_stride, length, SIZE, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = _visible(
                scores, bias, rows[:, None], columns[None, :], length, window, BIASED, masked == 1, CAUSAL, WINDOWED
            )
            weights = tl.exp2(scores - row_log[:, None])
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if THRESHOLD > 0:
                kept = keeps(slope[:, None], offset[:, None], columns_of(seed, columns)[None, :], THRESHOLD)
                dweights = tl.where(kept, dweights * inflation, 0.0)
            dscores = weights * (dweights - row_delta[:, None])
            found = tl.dot(dscores.to(k.dtype), k, found, input_precision=PRECISION)
    # `scale` has log2(e) in it.
    _write(grad_query + own, found * (scale * 0.6931471805599453), rows, HEADS * SIZE, length, SIZE, PADDED)


@kernel
def key_gradient(
    query, key, value, bias, bounds, numbers, log_sum, grad, delta, grad_key, grad_value,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    tokens, longest, scale, window, inflation,
    HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys. Tiles are (keys, queries), so that no product needs its weights turned."""
    start, length, group, first = _place(bounds, longest, HEADS // SHARE, COLUMNS)
    if first >= length:
        return
    columns = first + tl.arange(0, COLUMNS)
    k = _rows(key + start * key_stride + group * key_head, columns, key_stride, length, SIZE, PADDED)
    v = _rows(value + start * value_stride + group * value_head, columns, value_stride, length, SIZE, PADDED)
    dk = tl.zeros([COLUMNS, PADDED], tl.float32)
    dv = tl.zeros([COLUMNS, PADDED], tl.float32)
    low = 0
    high = length
    if CAUSAL:
        low = first // ROWS * ROWS
    if WINDOWED:
        low = tl.maximum(low, tl.maximum(first - window + 1, 0) // ROWS * ROWS)
        high = tl.minimum(high, first + COLUMNS + window - 1)
    for head in range(group * SHARE, (group + 1) * SHARE):
        table = bias + head * (2 * longest - 1) + longest - 1
        own = (start * HEADS + head) * SIZE
        line = head * tokens + start
        column_numbers = columns
        if THRESHOLD > 0:
            column_numbers = columns_of(_seed(numbers, head, start, tokens, HEADS), columns)
        for begin in range(low, high, ROWS):
            rows = begin + tl.arange(0, ROWS)
            q = _rows(query + start * query_stride + head * query_head, rows, query_stride, length, SIZE, PADDED)
            dout = _rows(grad + own, rows, HEADS * SIZE, length, SIZE, PADDED)
            # Rows past the end weigh nothing: exp2(… - inf) is 0.
            row_log = tl.load(log_sum + line + rows, mask=rows < length, other=float("inf"))
            row_delta = tl.load(delta + line + rows, mask=rows < length, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            scores = _visible(
                scores, table, rows[None, :], columns[:, None], length, window, BIASED, CAUSAL or WINDOWED, CAUSAL,
                WINDOWED,
            )  # fmt: skip
            weights = tl.exp2(scores - row_log[None, :])
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dropped = weights
            if THRESHOLD > 0:
                slope = numbers_of(numbers + line, rows, length)
                offset = numbers_of(numbers + HEADS * tokens + line, rows, length)
                kept = keeps(slope[None, :], offset[None, :], column_numbers[:, None], THRESHOLD)
                dropped = tl.where(kept, weights * inflation, 0.0)
                dweights = tl.where(kept, dweights * inflation, 0.0)
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dscores = weights * (dweights - row_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    groups: tl.constexpr = HEADS // SHARE
    own = (start * groups + group) * SIZE
    _write(grad_key + own, dk * (scale * 0.6931471805599453), columns, groups * SIZE, length, SIZE, PADDED)
    _write(grad_value + own, dv, columns, groups * SIZE, length, SIZE, PADDED)


@kernel
def bias_gradient(
    query, key, value, bias, bounds, numbers, log_sum, grad, delta, sums,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    tokens, longest, texts, splits, scale, window, inflation,
    HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores' gradients of the tiles along one diagonal of tiles, summed as they lie, over every `splits`-th text.

    Where tiles are square, a place in a tile has the same distance in all tiles of a diagonal: the sum needs no shifts.
    """
    many = tl.cdiv(longest, BLOCK)
    diagonals = 2 * many - 1
    program = tl.program_id(0)
    split = program % splits
    head = program // splits // diagonals
    shift = program // splits % diagonals - many + 1
    table = bias + head * (2 * longest - 1) + longest - 1
    place = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK, BLOCK], tl.float32)
    for text in range(split, texts, splits):
        start = tl.load(bounds + text).to(tl.int64)
        length = (tl.load(bounds + text + 1) - start).to(tl.int32)
        line = head * tokens + start
        filled = tl.cdiv(length, BLOCK)
        for block in range(tl.maximum(0, -shift), tl.minimum(filled, filled - shift)):
            rows = block * BLOCK + place
            columns = (block + shift) * BLOCK + place
            q = _rows(query + start * query_stride + head * query_head, rows, query_stride, length, SIZE, PADDED)
            k = _rows(key + start * key_stride + head // SHARE * key_head, columns, key_stride, length, SIZE, PADDED)
            v = _rows(
                value + start * value_stride + head // SHARE * value_head, columns, value_stride, length, SIZE, PADDED
            )
            dout = _rows(grad + (start * HEADS + head) * SIZE, rows, HEADS * SIZE, length, SIZE, PADDED)
            row_log = tl.load(log_sum + line + rows, mask=rows < length, other=float("inf"))
            row_delta = tl.load(delta + line + rows, mask=rows < length, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = _visible(
                scores, table, rows[:, None], columns[None, :], length, window, BIASED, True, CAUSAL, WINDOWED
            )
            weights = tl.exp2(scores - row_log[:, None])
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if THRESHOLD > 0:
                slope = numbers_of(numbers + line, rows, length)
                offset = numbers_of(numbers + HEADS * tokens + line, rows, length)
                column = columns_of(_seed(numbers, head, start, tokens, HEADS), columns)
                kept = keeps(slope[:, None], offset[:, None], column[None, :], THRESHOLD)
                dweights = tl.where(kept, dweights * inflation, 0.0)
            found += weights * (dweights - row_delta[:, None])
    tile = sums + program.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(tile + place[:, None] * BLOCK + place[None, :], found)
