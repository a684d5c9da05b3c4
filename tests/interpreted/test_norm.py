"""Dropout, residual sum and norm in one pass, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from burnish.kernels import norm as module

add_norm: Callable[..., tuple[Tensor, Tensor]] = module.add_norm
plain_add_norm: Callable[..., tuple[Tensor, Tensor]] = module.plain_add_norm
NAMES = ("norm", "sum", "states", "weight", "bias", "residual")
LAYER: dict[str, Any] = {"eps": 1e-5}
GEMMA: dict[str, Any] = {"eps": 1e-6, "centred": False, "offset": 1.0}


def inputs(rows: int, width: int) -> list[Tensor]:
    """States, weight, bias, residual, and the gradients of the norm and of the sum, float64."""
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (width,), (width,), (rows, width), (rows, width), (rows, width))
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def run(operation: Any, states: list[Tensor], dtype: torch.dtype, uses: str = "wbr", **options: Any) -> list[Tensor]:
    """[norm, sum, and the gradients of what `uses` names: weight, bias, residual] in `dtype`, widened to float64."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in states[:4]]
    chosen = [leaf if name in uses else None for name, leaf in zip("wbr", leaves[1:], strict=True)]
    out, total = operation(leaves[0], *chosen, **options)
    assert out.dtype == total.dtype == dtype and out.shape == total.shape == leaves[0].shape
    torch.autograd.backward([out, total], [each.to(dtype) for each in states[4:]])
    return [out.detach().double(), total.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]


def compare(rows: int, width: int, uses: str, options: dict[str, Any]) -> None:
    states = inputs(rows, width)
    found = run(add_norm, states, torch.float32, uses, **options)
    expected = run(plain_add_norm, states, torch.float64, uses, **options)
    assert len(found) == len(expected) == 3 + len(uses)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [LAYER, GEMMA], ids=["layer", "gemma"])
@pytest.mark.parametrize("uses", ["wbr", "wr", "w", "", "r"])
def test_every_combination_equals_float64(uses: str, options: dict[str, Any]) -> None:
    compare(7, 48, uses, options)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes minutes
@given(rows=st.integers(1, 40), width=st.sampled_from([2, 31, 64, 1000]), centred=st.booleans())
def test_any_shape_equals_float64(rows: int, width: int, centred: bool) -> None:
    compare(rows, width, "wbr", {"eps": 1e-3, "centred": centred})


def test_the_plain_versions_are_pytorchs() -> None:
    states, weight, bias, residual, *_ = inputs(5, 24)
    ours = plain_add_norm(states, weight, bias, residual, eps=1e-5)[0]
    torch.testing.assert_close(ours, functional.layer_norm(states + residual, (24,), weight, bias, 1e-5))
    ours = plain_add_norm(states, weight - 1, eps=1e-5, centred=False, offset=1.0)[0]
    torch.testing.assert_close(ours, functional.rms_norm(states, (24,), weight, 1e-5))


def test_many_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS", 3)
    monkeypatch.setattr(module, "_tile", lambda width: {"ROWS": 4, "WIDE": 64, "num_warps": 4})
    compare(50, 40, "wbr", LAYER)


def test_dropout_is_the_plain_formula_with_the_mask_that_was_drawn() -> None:
    states = inputs(33, 40)
    share = 0.3
    torch.manual_seed(3)
    shown = add_norm(torch.ones(33, 40), None, eps=1e-5, dropout=share)[1]
    kept = shown != 0
    assert 0.65 < kept.double().mean() < 0.75
    torch.testing.assert_close(shown[kept], torch.full_like(shown[kept], 1 / (1 - share)))
    torch.manual_seed(3)
    found = run(add_norm, states, torch.float32, eps=1e-5, dropout=share)

    def masked(states: Tensor, *rest: Any, dropout: float, **options: Any) -> tuple[Tensor, Tensor]:
        return plain_add_norm(states * kept / (1 - dropout), *rest, **options)

    for name, ours, truth in zip(
        NAMES, found, run(masked, states, torch.float64, eps=1e-5, dropout=share), strict=True
    ):
        assert truth.abs().max() > 0.1
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4, msg=name)
    assert not torch.equal(add_norm(torch.ones(33, 40), None, eps=1e-5, dropout=share)[1], shown)


def test_half_precision_is_within_twice_the_error_of_the_plain_version() -> None:
    states = inputs(20, 64)
    truth = run(plain_add_norm, states, torch.float64, **LAYER)
    plain = run(plain_add_norm, states, torch.float16, **LAYER)
    ours = run(add_norm, states, torch.float16, **LAYER)
    for name, found, half, exact in zip(NAMES, ours, plain, truth, strict=True):
        allowed = (half - exact).abs().max()
        assert allowed > 0 and (found - exact).abs().max() <= 2 * allowed, name


def test_unused_results_and_frozen_weights() -> None:
    states, weight, bias, residual, grad, _ = (each.float() for each in inputs(6, 16))
    states.requires_grad_()
    out, total = add_norm(states, weight, bias, residual, **LAYER)
    alone = torch.autograd.grad(total, states, grad, retain_graph=True)[0]
    torch.testing.assert_close(alone, grad)
    normed = torch.autograd.grad(out, states, grad)[0]
    truth = torch.autograd.grad(plain_add_norm(states, weight, bias, residual, **LAYER)[0], states, grad)[0]
    torch.testing.assert_close(normed, truth, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_refused() -> None:
    states = torch.zeros(2, 8)
    for wrong in ((states.double(), None), (states, torch.ones(7)), (states, None, None, torch.zeros(1, 8))):
        with pytest.raises(ValueError, match="add_norm"):
            add_norm(*wrong, eps=1e-5)
    with pytest.raises(ValueError, match="dropout"):
        add_norm(states, None, eps=1e-5, dropout=1.0)


def test_registered_as_pytorch_expects() -> None:
    states, weight, bias, residual, *_ = (each.float().requires_grad_() for each in inputs(6, 16))
    for beside in (residual, None):
        arguments = (states, weight, bias, beside, None, 1e-5, 0.0, True, 0.0)
        torch.library.opcheck(torch.ops.burnish.add_norm, arguments)
