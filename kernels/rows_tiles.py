"""Rows of a table in Triton: each program reads a stretch of one row as it is stored, and writes it in a dtype."""

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

COLUMNS = 1024
"""Numbers of a stretch, at most: a row of 768 is one, one of 2,560 is three."""


@jit
def gather_kernel(
    out, ids, table, scales, code, height,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One stretch of the row that `ids` names. BITS: 4, 8, or 0 for floating rows."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    asked = tl.load(ids + place).to(tl.int64)
    known = (asked >= 0) & (asked < height)
    row = tl.where(known, asked, 0)
    if BITS == 4:
        pair = tl.load(table + row * (WIDTH // 2) + column // 2, mask=inside, other=0).to(tl.int32)
        number = tl.load(code + tl.where(column % 2 == 0, pair >> 4, pair & 15))
    else:
        number = tl.load(table + row * WIDTH + column, mask=inside, other=0)
    if BITS != 0:
        share = tl.load(scales + row * ((WIDTH + BLOCK - 1) // BLOCK) + column // BLOCK, mask=inside, other=0.0)
        number = number.to(tl.float32) * share
    number = tl.where(known, number, float("nan"))
    tl.store(out + place * WIDTH + column, number.to(out.dtype.element_ty), mask=inside)


def gather(out: Tensor, ids: Tensor, table: Tensor, scales: Tensor | None, code: Tensor | None, block: int) -> None:
    """Write the rows `ids` (T,) of a table into `out` (T, D); see `rows.gather_rows`."""
    count, width = out.shape
    if not count:
        return
    columns = min(COLUMNS, triton.next_power_of_2(width))
    device: Any = torch.cuda.device_of
    with device(ids):
        gather_kernel[(count, triton.cdiv(width, columns))](
            out, ids, table, scales, code, table.shape[0],
            WIDTH=width, BLOCK=block, BITS=0 if scales is None else 8 if code is None else 4,
            COLUMNS=columns,
        )  # fmt: skip
