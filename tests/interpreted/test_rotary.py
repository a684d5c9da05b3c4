"""Rotary positions in one pass, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import rotary as module

rotary: Callable[..., Tensor] = module.rotary
plain_rotary: Callable[..., Tensor] = module.plain_rotary


def inputs(tokens: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, cos, sin and the gradient that comes back, float64."""
    angles = torch.rand(tokens, size // 2, dtype=torch.float64) * 50
    states, grad = torch.randn(2, tokens, heads, size, dtype=torch.float64)
    return states, angles.cos(), angles.sin(), grad


def run(operation: Any, given: Any, dtype: torch.dtype, turned: int) -> list[Tensor]:
    """[result, gradient] in `dtype` with angles in float32 or wider, widened to float64."""
    states, cos, sin, grad = given
    angles = torch.promote_types(dtype, torch.float32)
    leaf = states.to(dtype).requires_grad_() if dtype != states.dtype else states.clone().requires_grad_()
    out = operation(leaf, cos.to(angles), sin.to(angles), turned)
    assert out.dtype == dtype and out.shape == leaf.shape
    torch.autograd.backward(out, grad.to(dtype))
    assert leaf.grad is not None
    return [out.detach().double(), leaf.grad.double()]


@pytest.mark.parametrize("tokens, heads, size, turned", [(5, 3, 8, 2), (70, 6, 64, 4), (1, 1, 2, 1), (3, 2, 24, 0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_equals_float64(tokens: int, heads: int, size: int, turned: int, dtype: torch.dtype, tolerance: float) -> None:
    given = inputs(tokens, heads, size)
    expected = run(plain_rotary, given, torch.float64, turned)
    for found, truth in zip(run(rotary, given, dtype, turned), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)
    changed = (expected[0] - given[0]).abs().amax((0, 2)) > 1e-6
    assert changed[:turned].all() and not changed[turned:].any()


def test_views_are_read_in_place_and_their_gradients_go_home() -> None:
    states, cos, sin, grad = (each.float() for each in inputs(9, 4, 16))
    wide = torch.cat([states, states], dim=1).requires_grad_()
    out = rotary(wide[:, 2:6], cos, sin, 3)
    torch.testing.assert_close(out, plain_rotary(wide.detach()[:, 2:6], cos, sin, 3))
    torch.autograd.backward(out, grad)
    assert wide.grad is not None and not wide.grad[:, :2].any() and wide.grad[:, 2:6].abs().min() > 0


def test_what_does_not_go_together_is_refused() -> None:
    states, cos, sin, _ = (each.float() for each in inputs(4, 2, 8))
    for wrong in ((states, cos, sin, 3), (states, cos[1:], sin, 1), (states.double(), cos, sin, 1)):
        with pytest.raises(ValueError, match="rotary"):
            rotary(*wrong)
    assert rotary(states[:0], cos[:0], sin[:0], 1).shape == (0, 2, 8)


def test_registered_as_pytorch_expects() -> None:
    states, cos, sin, _ = (each.float() for each in inputs(4, 2, 8))
    torch.library.opcheck(torch.ops.burnish.rotary, (states.requires_grad_(), cos, sin, 1, False))
