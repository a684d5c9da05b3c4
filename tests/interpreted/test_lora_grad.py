"""Gradients of LoRA's small matrices, in parts by rows, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.kernels import lora_grad as module

lora_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = module.lora_gradients
plain_lora_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = module.plain_lora_gradients
tall_product: Callable[..., Tensor] = module.tall_product


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction, several parts."""
    monkeypatch.setattr(module, "TALL", (32, 16, 4, 1))
    monkeypatch.setattr(module, "SINGLE", (32, 16, 4, 1))
    monkeypatch.setattr(module, "JOINT", {16: (32, 16, 4, 1), 32: (32, 16, 4, 1)})
    monkeypatch.setattr(module, "PROGRAMS", 8)


def drawn(rows: int, width: int, out: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, dy, x A^T and B."""
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (rows, out), (rows, rank), (out, rank))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def check(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert found.shape == exact.shape and found.is_contiguous()
    assert exact.numel() == 0 or exact.abs().max() > 0.1, "nothing to compare"
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes minutes
@given(
    rows=st.integers(1, 150),
    width=st.integers(1, 80),
    rank=st.sampled_from([1, 4, 16, 20, 64, 70]),
    turned=st.booleans(),
)
def test_tall_products_equal_float64(rows: int, width: int, rank: int, turned: bool) -> None:
    wide, _, narrow, _ = drawn(rows, width, 1, rank)
    exact = narrow.double().t() @ wide.double()
    torch.testing.assert_close(
        tall_product(narrow, wide, turned).double(), exact.t() if turned else exact, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "rows, width, out, rank", [(150, 48, 70, 16), (16, 32, 32, 8), (65, 33, 100, 32), (1, 16, 16, 4)]
)
def test_all_three_in_float16_equal_float64(rows: int, width: int, out: int, rank: int) -> None:
    x, dy, seen, up = drawn(rows, width, out, rank, torch.float16)
    back, down_grad, up_grad = lora_gradients(x, dy, seen, up.float(), 0.5)
    assert back.dtype == torch.float16 and down_grad.dtype == up_grad.dtype == torch.float32
    check(back, 0.5 * dy.double() @ up.double(), 2e-2)
    check(up_grad, 0.5 * dy.double().t() @ seen.double(), 1e-3)
    # dA is made from the rounded dy B, as the plain version makes it.
    check(down_grad, back.double().t() @ x.double(), 1e-2)


@pytest.mark.parametrize("rank, dtype", [(64, torch.float16), (16, torch.float32)])
def test_what_the_joint_pass_is_not_for_equals_it(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the joint pass ran")

    monkeypatch.setattr(module, "_joint_pass", refuse)
    states = drawn(70, 48, 64, rank, dtype)
    for found, expected in zip(lora_gradients(*states, 2.0), plain_lora_gradients(*states, 2.0), strict=True):
        check(found, expected.double(), 1e-2 if dtype == torch.float16 else 1e-4)


def test_columns_of_a_wider_matrix_are_read_in_place() -> None:
    x, dy, seen, up = drawn(50, 96, 96, 16, torch.float16)
    parts = x[:, 32:64], dy[:, 48:], seen, up[48:]
    apart = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    for found, expected in zip(lora_gradients(*parts, 1.0), lora_gradients(*apart, 1.0), strict=True):
        assert torch.equal(found, expected)


def test_no_rows() -> None:
    back, down_grad, up_grad = lora_gradients(*drawn(0, 32, 48, 8, torch.float16), 1.0)
    assert back.shape == (0, 8) and down_grad.shape == (8, 32) and up_grad.shape == (48, 8)
    assert not down_grad.any() and not up_grad.any()


def test_what_does_not_go_together_is_refused() -> None:
    x, dy, seen, up = drawn(8, 16, 16, 4)
    for wrong in ((x[1:], dy, seen, up), (x, dy.half(), seen, up), (x, dy, seen, up.t())):
        with pytest.raises(ValueError, match="do not go together"):
            lora_gradients(*wrong, 1.0)
    with pytest.raises(ValueError, match="tall_product"):
        tall_product(seen, x.half())


def test_registered_as_pytorch_expects() -> None:
    x, dy, seen, up = drawn(40, 48, 64, 8, torch.float16)
    torch.library.opcheck(torch.ops.burnish.tall_product, (seen, x, True))
    torch.library.opcheck(torch.ops.burnish.lora_joint_pass, (dy, seen, up, 0.5))
