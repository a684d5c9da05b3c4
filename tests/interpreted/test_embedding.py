"""Embeddings and the gradient of their table, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.kernels import embedding as module

embedding: Callable[..., Tensor] = module.embedding
plain_embedding: Callable[..., Tensor] = module.plain_embedding


def run(
    operation: Any, ids: Tensor, rows: int, width: int, dtype: torch.dtype, padding: int | None
) -> tuple[Tensor, Tensor]:
    """(rows looked up, the table's gradient) in `dtype`, widened to float64."""
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    out = operation(ids, table, padding)
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(dtype)
    torch.autograd.backward(out, grad)
    assert table.grad is not None and table.grad.dtype == dtype
    return out.detach().double(), table.grad.double()


def compare(ids: Tensor, rows: int, width: int, padding: int | None = None) -> Tensor:
    found = run(embedding, ids, rows, width, torch.float32, padding)
    truth = run(plain_embedding, ids, rows, width, torch.float64, padding)
    torch.testing.assert_close(found[0].float(), truth[0].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], truth[1], rtol=1e-5, atol=1e-5)
    return found[1]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_one_token_at_many_places(kind: torch.dtype) -> None:
    """Runs of 1, 15, 16, 17 and 40 places, where 16 are added up at a time."""
    ids = torch.repeat_interleave(torch.tensor([3, 0, 9, 5, 7]), torch.tensor([1, 15, 16, 17, 40]))
    grad = compare(ids[torch.randperm(89)].to(kind), 11, 40)
    assert grad[[3, 0, 9, 5, 7]].abs().amax(1).min() > 0.1 and not grad[[1, 2, 4, 6, 8, 10]].any()


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes minutes
@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=60), width=st.sampled_from([1, 24, 300]))
def test_any_ids_equal_float64(ids: list[int], width: int) -> None:
    compare(torch.tensor(ids), 7, width)


def test_padding_gets_no_gradient_and_shapes_are_kept() -> None:
    ids = torch.tensor([[1, 2, 1], [0, 1, 2]])
    grad = compare(ids, 4, 8, padding=1)
    assert not grad[1].any() and grad[2].abs().max() > 0.1


def test_halves_are_added_up_in_float32() -> None:
    """Thousands of ones: added up in float16 they would stop at 2048."""
    table = torch.zeros(2, 8, dtype=torch.float16, requires_grad=True)
    torch.autograd.backward(embedding(torch.ones(5000, dtype=torch.int64), table).sum())
    assert table.grad is not None and torch.equal(table.grad[1], torch.full((8,), 5000.0, dtype=torch.float16))


def test_no_places_and_what_is_refused() -> None:
    table = torch.zeros(3, 4, requires_grad=True)
    torch.autograd.backward(embedding(torch.zeros(0, dtype=torch.int64), table).sum())
    assert table.grad is not None and not table.grad.any()
    with pytest.raises(ValueError, match="float64"):
        embedding(torch.zeros(1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.float64))


def test_registered_as_pytorch_expects() -> None:
    table = torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.burnish.embedding, (torch.tensor([1, 3, 1]), table, -1))
