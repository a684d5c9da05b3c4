"""Rows of a frozen table by their numbers: out of 8 or 4 bits, or out of host memory, without the rest of the table.

An embedding table is by far the largest weight of a small model, and a batch reads a few thousand of its rows. Those
are gathered as they are stored, and only they are made into the dtype that the model computes in. The Triton part is in
`rows_tiles`.

T: rows that are asked for, V: rows of the table, D: numbers of a row, S: scales of a row, D / block rounded up.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    from . import rows_tiles
except ImportError:  # Triton has no wheels for this system
    rows_tiles = None  # type: ignore[assignment]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def gather_rows(
    ids: Tensor,
    table: Tensor,
    scales: Tensor | None = None,
    code: Tensor | None = None,
    *,
    dtype: torch.dtype,
    block: int = 64,
) -> Tensor:
    """Some rows of a table, in plain PyTorch on any device. No gradient: the table is frozen.

    Args:
        ids: (T,) int32 or int64, each below V, on the device that the rows shall be on.
        table: (V, D) floating; (V, D) int8, which the `scales` multiply; or, with a `code`, (V, D / 2) uint8, two
            numbers a byte, the first in the upper half. It may lie in host memory.
        scales: (V, S) float32, one for each `block` numbers of a row, the last perhaps for fewer; None for floating
            rows.
        code: (16,) float32, what 4 bits stand for before they are scaled; None for any other table.
        dtype: The dtype that the rows shall have. Numbers are scaled in float32 and rounded once.
        block: Numbers of a row that share a scale.

    Returns:
        (T, D) in `dtype`, on the device of `ids`.
    """
    places = ids.to(table.device)
    rows = table.index_select(0, places).to(ids.device)
    if scales is None:
        return rows.to(dtype)
    if code is not None:
        rows = code[torch.stack([rows >> 4, rows & 15], dim=-1).flatten(1).int()]
    spread = scales.index_select(0, places).repeat_interleave(block, dim=1)[:, : rows.shape[1]]
    return (rows.float() * spread.to(ids.device)).to(dtype)


def triton_gather_rows(
    ids: Tensor,
    table: Tensor,
    scales: Tensor | None = None,
    code: Tensor | None = None,
    *,
    dtype: torch.dtype,
    block: int = 64,
) -> Tensor:
    """`gather_rows` as one Triton kernel: the same arguments and result.

    The kernel reads a table in pinned host memory over the bus, with nothing done on the host, so that a CUDA graph
    holds it. A number that is no row's gives a row of NaN. Ids that are not on a CUDA device, and tables that are
    neither on theirs nor in pinned memory, or not contiguous, take the plain way.
    """
    rows: Tensor = _gather(ids, table, scales, code, dtype, block)
    return rows


@torch.library.custom_op("burnish::gather_rows", mutates_args=())
def _gather(
    ids: Tensor, table: Tensor, scales: Tensor | None, code: Tensor | None, dtype: torch.dtype, block: int
) -> Tensor:
    reachable = INTERPRETED or (ids.is_cuda and (table.device == ids.device or table.is_pinned()))
    if rows_tiles is None or not reachable or not table.is_contiguous():
        return gather_rows(ids, table, scales, code, dtype=dtype, block=block)
    out = ids.new_empty(len(ids), _width(table, code), dtype=dtype)
    rows_tiles.gather(out, ids.contiguous(), table, scales, code, block)
    return out


@_gather.register_fake
def _(ids: Tensor, table: Tensor, scales: Tensor | None, code: Tensor | None, dtype: torch.dtype, block: int) -> Tensor:
    return ids.new_empty(ids.shape[0], _width(table, code), dtype=dtype)


def _width(table: Tensor, code: Tensor | None) -> int:
    return table.shape[1] * (1 if code is None else 2)
