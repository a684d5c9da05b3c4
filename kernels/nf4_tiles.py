"""A weight out of 4 or 8 bits, with its LoRA update, in Triton: one read of the bits, one write of 16."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

jit: Callable[[Any], Any] = triton.jit

# Rows, columns and warps of a tile; the ranks that are multiplied at a time. On an H100 4096 x 1024 weights take 4.6 us
# (bitsandbytes 10.1), with an update of rank 32 in three products of tf32 13.3, with 64 rows 21, with 256 columns 17.
ROWS, COLUMNS, WARPS, RANKS = 32, 128, 4, 32


@jit
def scale_of(scales, coarse_table, coarse, offset, block, mask, NESTED: tl.constexpr, COARSE: tl.constexpr):
    """The scale of each block."""
    if NESTED:
        fine = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(coarse_table + fine) * tl.load(coarse + block // COARSE, mask=mask, other=0.0)
        return scale + tl.load(offset)
    else:
        return tl.load(scales + block, mask=mask, other=0.0)


@jit
def write_kernel(
    out, data, scales, table, coarse_table, coarse, offset, up, down, factor, rows, columns, stride,
    EIGHT: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of W + s B A: W's numbers are a table's at 4 bits times their block's scale, or 8 bits times a row's.

    Where every row is WHOLE blocks, a byte is read once and a scale once for its block; else both once a number.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within, beside = row < rows, column < columns
    inside = within[:, None] & beside[None, :]
    if EIGHT:
        scale = tl.load(scales + row, mask=within, other=0.0)
        bits = tl.load(data + row[:, None] * columns + column[None, :], mask=inside, other=0)
        weight = bits.to(tl.float32) * scale[:, None] * 0.007874015748031496
    elif WHOLE:
        pairs: tl.constexpr = COLUMNS // 2
        groups: tl.constexpr = COLUMNS // BLOCK
        pair = tl.program_id(1) * pairs + tl.arange(0, pairs)
        mask = within[:, None] & (pair < columns // 2)[None, :]
        byte = tl.load(data + row[:, None] * (columns // 2) + pair[None, :], mask=mask, other=0).to(tl.int32)
        group = tl.program_id(1) * groups + tl.arange(0, groups)
        known = within[:, None] & (group < columns // BLOCK)[None, :]
        block = row[:, None] * (columns // BLOCK) + group[None, :]
        scale = scale_of(scales, coarse_table, coarse, offset, block, known, NESTED, COARSE)
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, groups, BLOCK // 2)).reshape(ROWS, pairs)
        # The first of two numbers has the upper bits.
        weight = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    else:
        place = row[:, None] * columns + column[None, :]
        byte = tl.load(data + place // 2, mask=inside, other=0).to(tl.int32)
        scale = scale_of(scales, coarse_table, coarse, offset, place // BLOCK, inside, NESTED, COARSE)
        weight = tl.load(table + tl.where(place % 2 == 0, byte >> 4, byte & 15)) * scale
    for first in tl.static_range(0, RANK, RANKS):
        rank = first + tl.arange(0, RANKS)
        left = tl.load(
            up + row[:, None] * RANK + rank[None, :], mask=within[:, None] & (rank < RANK)[None, :], other=0.0
        ).to(tl.float32)
        right = tl.load(
            down + rank[:, None] * columns + column[None, :], mask=(rank < RANK)[:, None] & beside[None, :], other=0.0
        ).to(tl.float32)
        weight += tl.dot(left * factor, right, input_precision=PRECISION)
    tl.store(out + row[:, None] * stride + column[None, :], weight.to(out.dtype.element_ty), mask=inside)


def write(out: Tensor, stored: Any, down: Tensor | None, up: Tensor | None, factor: float) -> None:
    """Write W + s B A into `out`, (O, I) with numbers of a row side by side; the arguments are `nf4.write`'s."""
    rows, columns, block = stored.rows, stored.columns, stored.block
    rank = 0 if down is None else down.shape[0]
    any_pointer = stored.scales  # not read where there is no update
    # Products of tf32, 2^-11 off, summed in float32: finer than what a sum rounded to 16 bits can show of an update.
    precision = "tf32x3" if out.dtype == torch.float32 else "tf32"
    # Products and sums are not contracted: a scale is rounded between the two, as in bitsandbytes' two kernels.
    write_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        out, stored.data, stored.scales, stored.table, stored.coarse_table, stored.coarse, stored.offset,
        any_pointer if up is None else up.contiguous(), any_pointer if down is None else down.contiguous(),
        factor, rows, columns, out.stride(0), EIGHT=stored.eight, NESTED=stored.nested,
        WHOLE=columns % block == 0 and COLUMNS % block == 0, BLOCK=block, COARSE=stored.coarse_block, RANK=rank,
        ROWS=ROWS, COLUMNS=COLUMNS, RANKS=RANKS, PRECISION=precision, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
