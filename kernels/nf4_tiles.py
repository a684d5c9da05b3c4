"""A weight out of 4 or 8 bits, with its LoRA update, in Triton: one read of the bits, one write of 16."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

jit: Callable[[Any], Any] = triton.jit

# Rows, columns and warps of a tile; the ranks that are multiplied at a time.
ROWS, COLUMNS, WARPS, RANKS = 32, 128, 4, 32


@jit
def write_kernel(
    out, data, scales, table, coarse_table, coarse, offset, up, down, factor, rows, columns, stride,
    EIGHT: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One tile of W + s B A: W's numbers are a table's at 4 bits times their block's scale, or 8 bits times a row's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within, beside = row < rows, column < columns
    inside = within[:, None] & beside[None, :]
    place = row[:, None] * columns + column[None, :]
    if EIGHT:
        scale = tl.load(scales + row, mask=within, other=0.0)
        weight = tl.load(data + place, mask=inside, other=0).to(tl.float32) * scale[:, None] * 0.007874015748031496
    else:
        pair = tl.load(data + place // 2, mask=inside, other=0).to(tl.int32)
        half = tl.where(place % 2 == 0, pair >> 4, pair & 15)  # the first of two numbers has the upper bits
        block = place // BLOCK
        if NESTED:
            fine = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
            scale = tl.load(coarse_table + fine) * tl.load(coarse + block // COARSE, mask=inside, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(scales + block, mask=inside, other=0.0)
        weight = tl.load(table + half) * scale
    for first in tl.static_range(0, RANK, RANKS):
        rank = first + tl.arange(0, RANKS)
        left = tl.load(
            up + row[:, None] * RANK + rank[None, :], mask=within[:, None] & (rank < RANK)[None, :], other=0.0
        ).to(tl.float32)
        right = tl.load(
            down + rank[:, None] * columns + column[None, :], mask=(rank < RANK)[:, None] & beside[None, :], other=0.0
        ).to(tl.float32)
        weight += tl.dot(left * factor, right, input_precision="tf32x3")
    tl.store(out + row[:, None] * stride + column[None, :], weight.to(out.dtype.element_ty), mask=inside)


def write(out: Tensor, stored: Any, down: Tensor | None, up: Tensor | None, factor: float) -> None:
    """Write W + s B A into `out`, (O, I) with numbers of a row side by side; the arguments are `nf4.write`'s."""
    rows, columns = stored.rows, stored.columns
    rank = 0 if down is None else down.shape[0]
    any_pointer = stored.scales  # not read where there is no update
    # Products and sums are not contracted: a scale is rounded between the two, as in bitsandbytes' two kernels.
    write_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        out, stored.data, stored.scales, stored.table, stored.coarse_table, stored.coarse, stored.offset,
        any_pointer if up is None else up.contiguous(), any_pointer if down is None else down.contiguous(),
        factor, rows, columns, out.stride(0), EIGHT=stored.eight, NESTED=stored.nested, BLOCK=stored.block,
        COARSE=stored.coarse_block, RANK=rank, ROWS=ROWS, COLUMNS=COLUMNS, RANKS=RANKS, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
