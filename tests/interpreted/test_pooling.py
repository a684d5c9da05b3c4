"""One vector for each packed text, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.kernels import pooling as module

packed_pool: Callable[..., Tensor] = module.packed_pool
plain_packed_pool: Callable[..., Tensor] = module.plain_packed_pool


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def run(operation: Any, lengths: tuple[int, ...], width: int, dtype: torch.dtype, *options: Any) -> list[Tensor]:
    """[vectors, gradient] in `dtype`, widened to float64."""
    draw = torch.Generator().manual_seed(width)
    states = torch.randn(sum(lengths), width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(len(lengths), width, generator=draw, dtype=torch.float64).to(dtype)
    leaf = states.detach().requires_grad_()
    out = operation(leaf, bounds(lengths), *options)
    assert out.dtype == dtype and out.shape == grad.shape
    torch.autograd.backward(out, grad)
    assert leaf.grad is not None
    return [out.detach().double(), leaf.grad.double()]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("lengths, width", [((5, 0, 1, 70), 24), ((1,), 2), ((40, 33), 384)], ids=str)
def test_equals_float64(lengths: tuple[int, ...], width: int, mode: str, normalize: bool) -> None:
    found = run(packed_pool, lengths, width, torch.float32, mode, normalize)
    truth = run(plain_packed_pool, lengths, width, torch.float64, mode, normalize)
    assert truth[1].abs().max() > 1e-3
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes minutes
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any).map(tuple),
    mode=st.sampled_from(module.MODES),
    normalize=st.booleans(),
)
def test_any_lengths_equal_float64(lengths: tuple[int, ...], mode: str, normalize: bool) -> None:
    found = run(packed_pool, lengths, 9, torch.float32, mode, normalize)
    for ours, exact in zip(found, run(plain_packed_pool, lengths, 9, torch.float64, mode, normalize), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", module.MODES)
def test_half_precision_is_as_near_as_the_plain_version(mode: str) -> None:
    truth, half, ours = (
        run(operation, (30, 7), 64, dtype, mode, True)
        for operation, dtype in (
            (plain_packed_pool, torch.float64),
            (plain_packed_pool, torch.float16),
            (packed_pool, torch.float16),
        )
    )
    for found, plain, exact in zip(ours, half, truth, strict=True):
        assert 0 < (plain - exact).abs().max() < 0.01
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_a_vector_of_nothing_stays_one() -> None:
    states = torch.zeros(3, 8, requires_grad=True)
    out = packed_pool(states, bounds((3,)), "mean", True)
    torch.autograd.backward(out, torch.ones(1, 8))
    plain = torch.zeros(3, 8, requires_grad=True)
    torch.autograd.backward(plain_packed_pool(plain, bounds((3,)), "mean", True), torch.ones(1, 8))
    assert not out.any() and states.grad is not None and plain.grad is not None
    torch.testing.assert_close(states.grad, plain.grad)


def test_what_it_cannot_do_is_refused() -> None:
    for states, mode in ((torch.zeros(2, 4), "max"), (torch.zeros(2, 4).double(), "mean")):
        with pytest.raises(ValueError, match="packed_pool"):
            packed_pool(states, bounds((2,)), mode)


def test_registered_as_pytorch_expects() -> None:
    states = torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.burnish.packed_pool, (states, bounds((2, 3)), 0, True))
