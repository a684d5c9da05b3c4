"""The kernel that gathers rows against the plain version: every storage, odd shapes, ids that come twice."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from burnish.core.testing.operations import OPERATIONS
from burnish.kernels import rows_tiles
from burnish.kernels.rows import gather_rows, triton_gather_rows

HEIGHT = 50


def table(kind: str, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(table,), (table, scales) or (table, scales, code) of random numbers."""
    draw = torch.Generator().manual_seed(width)
    scales = torch.rand(HEIGHT, -(-width // 64), generator=draw) + 0.1
    if kind == "8bit":
        return torch.randint(-127, 128, (HEIGHT, width), generator=draw, dtype=torch.int8), scales
    if kind == "4bit":
        pairs = torch.randint(0, 256, (HEIGHT, width // 2), generator=draw, dtype=torch.uint8)
        return pairs, scales, torch.randn(16, generator=draw)
    return (torch.randn(HEIGHT, width, generator=draw).to(dtype),)


def compare(ids: Tensor, stored: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    expected = gather_rows(ids, *stored, dtype=dtype)
    found = triton_gather_rows(ids, *stored, dtype=dtype)
    assert found.shape == expected.shape and found.dtype == expected.dtype == dtype
    if dtype == torch.bfloat16:  # which the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)
    assert len(set(ids.tolist())) == 1 or not torch.equal(expected[0], expected[-1]), "all rows are one"


@pytest.mark.parametrize("count, width", list(itertools.product((1, 7, 129), (32, 96, 384))))
@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
def test_rows_are_the_plain_version_s(kind: str, count: int, width: int) -> None:
    for dtype, whole in itertools.product((torch.float32, torch.float16, torch.bfloat16), (torch.int32, torch.int64)):
        ids = torch.arange(count, dtype=whole) * 7 % HEIGHT  # from 50 on each comes again
        compare(ids, table(kind, width, dtype), dtype)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
def test_a_row_of_several_stretches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_tiles, "COLUMNS", 64)
    compare(torch.tensor([3, 49, 3, 7]), table(kind, 150, torch.float32), torch.float32)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
def test_what_is_no_row_s_number_is_nan_and_reads_nothing(kind: str) -> None:
    found = triton_gather_rows(torch.tensor([HEIGHT, -1, 2]), *table(kind, 32, torch.float32), dtype=torch.float32)
    assert found[:2].isnan().all() and found[2].isfinite().all()


def test_ids_and_tables_that_do_not_lie_side_by_side() -> None:
    ids, (dense,) = torch.arange(40).view(20, 2)[:, 1], table("host", 96, torch.float32)
    compare(ids, (dense,), torch.float32)
    compare(ids, (dense[:, ::2],), torch.float32)


def test_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert triton_gather_rows(none, *table("8bit", 32, torch.float32), dtype=torch.float32).shape == (0, 32)


def test_it_passes_the_check_for_authors_and_another_order_of_halves_does_not() -> None:
    told = OPERATIONS["gather_rows"](triton_gather_rows, gather_rows, torch.float32, "cpu", 0.0)
    assert told == "54 cases, 0e+00"

    def swapped(ids: Tensor, table: Tensor, *rest: Tensor, dtype: torch.dtype) -> Tensor:
        halves = table << 4 | table >> 4 if table.dtype == torch.uint8 else table
        return gather_rows(ids, halves, *rest, dtype=dtype)

    with pytest.raises(AssertionError, match=r"1 rows of 32, 4bit, are off by"):
        OPERATIONS["gather_rows"](swapped, gather_rows, torch.float32, "cpu", 0.0)
