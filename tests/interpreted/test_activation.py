"""Activations and gates in one pass, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import activation as module

FUNCTIONS: dict[bool, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    False: (module.activation, module.plain_activation),
    True: (module.gated_activation, module.plain_gated_activation),
}


def run(operation: Any, states: Tensor, grad: Tensor, dtype: torch.dtype, name: str) -> list[Tensor]:
    """[result, gradient] in `dtype`, widened to float64."""
    leaf = states.detach().to(dtype).requires_grad_()
    out = operation(leaf, name)
    assert out.dtype == dtype and out.shape == grad.shape
    torch.autograd.backward(out, grad.to(dtype))
    assert leaf.grad is not None
    return [out.detach().double(), leaf.grad.double()]


def inputs(gated: bool, *shape: int) -> tuple[Tensor, Tensor]:
    """Numbers from -8 to 8, and a gradient of the result's shape."""
    states = torch.rand(shape, dtype=torch.float64) * 16 - 8
    return states, torch.randn(*shape[:-1], shape[-1] // (2 if gated else 1), dtype=torch.float64)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", module.KINDS)
@pytest.mark.parametrize("shape", [(5, 34), (1, 2), (2, 30, 48), (1, 4098)], ids=str)
def test_equals_float64(name: str, gated: bool, shape: tuple[int, ...]) -> None:
    ours, plain = FUNCTIONS[gated]
    states, grad = inputs(gated, *shape)
    for found, truth in zip(
        run(ours, states, grad, torch.float32, name), run(plain, states, grad, torch.float64, name), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", module.KINDS)
def test_half_precision_is_within_twice_the_error_of_the_plain_version(name: str, gated: bool) -> None:
    ours, plain = FUNCTIONS[gated]
    states, grad = inputs(gated, 40, 64)
    truth = run(plain, states, grad, torch.float64, name)
    halves = run(plain, states, grad, torch.float16, name)
    for found, half, exact in zip(run(ours, states, grad, torch.float16, name), halves, truth, strict=True):
        allowed = (half - exact).abs().max()
        assert allowed > 0 and (found - exact).abs().max() <= 2 * allowed


def test_no_rows_and_what_is_refused() -> None:
    assert FUNCTIONS[True][0](torch.zeros(0, 8), "silu").shape == (0, 4)
    for states, name, words in (
        (torch.zeros(2, 3), "silu", "halves"),
        (torch.zeros(2, 4), "relu", "'relu' is none of"),
        (torch.zeros(2, 4, dtype=torch.float64), "gelu", "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            FUNCTIONS[True][0](states, name)


def test_registered_as_pytorch_expects() -> None:
    torch.library.opcheck(torch.ops.burnish.activate, (torch.randn(3, 8, requires_grad=True), 1, True))
