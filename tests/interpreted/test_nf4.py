"""The kernel that makes weights out of 4 and 8 bits, against its plain version: bit for bit, odd shapes, any rank."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from burnish.kernels import nf4, nf4_tiles
from burnish.kernels.nf4 import Stored

SHAPES = ((1, 2), (7, 24), (33, 128), (40, 192), (96, 64))
DTYPES = (torch.float32, torch.float16)  # to bfloat16 the interpreter cuts bits off where a card rounds


def weight_of(rows: int, columns: int, kind: str) -> Stored:
    """Random bits and scales."""
    draw = torch.Generator().manual_seed(rows)
    none = torch.empty(0)
    if kind == "eight":
        data = torch.randint(-127, 128, (rows * columns,), generator=draw).to(torch.int8)
        return Stored(data, torch.rand(rows, generator=draw), none, none, none, none, rows, columns)
    data = torch.randint(0, 256, (-(-rows * columns // 2),), generator=draw).to(torch.uint8)
    blocks, table = -(-rows * columns // 64), torch.randn(16, generator=draw)
    if kind == "single":
        return Stored(data, torch.rand(blocks, generator=draw), table, none, none, none, rows, columns)
    scales = torch.randint(0, 256, (blocks,), generator=draw).to(torch.uint8)
    coarse, offset = torch.rand(-(-blocks // 256), generator=draw), torch.rand(1, generator=draw)
    return Stored(scales=scales, data=data, table=table, coarse_table=torch.randn(256, generator=draw), coarse=coarse,
                  offset=offset, rows=rows, columns=columns)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"), list(itertools.product(SHAPES, ("double", "single", "eight"), DTYPES))
)
def test_numbers_are_those_of_the_plain_version(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    weight = weight_of(*shape, kind)
    expected = nf4.dense(weight).to(dtype)
    wide = torch.full((shape[0] + 1, shape[1] + 3), torch.nan, dtype=dtype)
    nf4.write(wide[: shape[0], : shape[1]], weight)
    assert torch.equal(wide[: shape[0], : shape[1]], expected) and expected.abs().sum() > 0
    wide[: shape[0], : shape[1]] = torch.nan
    assert wide.isnan().all(), "it wrote beside its place"


@pytest.mark.parametrize("rank", [1, 8, 32, 40])
@pytest.mark.parametrize("kind", ["double", "eight"])
def test_the_update_is_added_before_rounding(rank: int, kind: str) -> None:
    weight = weight_of(37, 136, kind)
    down, up = update(rank, 37, 136)
    exact = nf4.dense(weight).double() + 0.5 * up.double() @ down.double()
    found = nf4.effective_weight(weight, down, up, 0.5, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    half = nf4.effective_weight(weight, down, up, 0.5, torch.float16)
    assert (half.double() - exact).abs().le(2.0**-11 * exact.abs() * 1.01 + 1e-6).all()


def test_a_matrix_of_several_layers_is_the_plain_version_s(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [weight_of(20, 64, "double"), weight_of(9, 64, "double")]
    tensors, sizes = nf4.flatten(weights)
    pairs = [update(4, 20, 64), update(8, 9, 64)]
    arguments = (tensors, sizes, [down for down, _ in pairs], [up for _, up in pairs], [1.0, 0.5], 4)
    like = torch.zeros(1, 64)
    found = [nf4.stored_rows(*arguments, like), nf4.stored_columns(*arguments, like)]
    monkeypatch.setattr(nf4, "nf4_tiles", None)
    expected = [nf4.stored_rows(*arguments, like), nf4.stored_columns(*arguments, like)]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def update(rank: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(rank, columns, generator=draw) * 0.1, torch.randn(rows, rank, generator=draw) * 0.1


def test_the_kernel_is_what_runs_here() -> None:
    assert nf4.INTERPRETED and vars(nf4)["nf4_tiles"] is nf4_tiles
