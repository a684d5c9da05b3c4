"""Dropout by hashes: as much as torch's, independent of place, and no mask is kept once a compiler has fused it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from burnish.backends.regions import light_dropouts
from burnish.kernels.light_dropout import LightDropout, light_dropout

ROWS, WIDTH = 4000, 96


@pytest.fixture
def dropped() -> Tensor:
    torch.manual_seed(0)
    return light_dropout(torch.ones(1, ROWS, WIDTH), 0.1)[0]


def test_a_tenth_is_dropped_and_the_rest_makes_up_for_it(dropped: Tensor) -> None:
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / 0.9])
    share = (dropped == 0).double().mean()
    assert abs(share - 0.1) < 4 * (0.09 / dropped.numel()) ** 0.5


def test_rows_columns_and_rectangles_are_independent(dropped: Tensor) -> None:
    """Products of centred masks have mean zero: of two in a row, of two in a column, of three, of four corners."""
    mask = ((dropped > 0).double() - 0.9) / 0.3
    half, wide = ROWS // 2, WIDTH // 2
    corners = mask[:half, :wide] * mask[:half, wide:] * mask[half:, :wide] * mask[half:, wide:]
    neighbours = mask[:, :-2] * mask[:, 1:-1] * mask[:, 2:]
    for product in (mask[:, 1:] * mask[:, :-1], mask[1:] * mask[:-1], neighbours, corners):
        assert product.mean().abs() < 5 * product.std() / product.numel() ** 0.5
    rows, columns = mask @ mask.t() / WIDTH**0.5, mask.t() @ mask / ROWS**0.5
    for products in (rows, columns):
        others = products[~torch.eye(len(products), dtype=torch.bool)]
        assert abs(others.std() - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_numbers_were_kept(dtype: torch.dtype) -> None:
    states = torch.randn(3, 7, 16, dtype=dtype).requires_grad_()
    out = light_dropout(states, 0.5)
    assert out.dtype == dtype and out.shape == states.shape
    torch.autograd.backward(out, torch.ones_like(out))
    assert states.grad is not None and 0 < int((out != 0).sum()) < out.numel()
    torch.testing.assert_close(states.grad, (out != 0).to(dtype) * 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_it_draws_anew_and_keeps_no_mask() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(16, 16)
    kept: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    def block(states: Tensor) -> Tensor:
        return functional.layer_norm(light_dropout(layer(states), 0.1) + states, (16,)).square().square().sum()

    compiled: Any = torch.compile(block, backend="inductor", dynamic=True)
    states = torch.randn(1, 500, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        out = compiled(states)
    out.backward()
    assert states.grad is not None and bool(states.grad.abs().sum() > 0)
    assert kept and not any(one.dtype == torch.bool for one in kept), [(one.shape, one.dtype) for one in kept]
    whole = [one for one in kept if one.numel() == states.numel() and one.dtype == torch.int32]
    assert not whole, "numbers were drawn for each element"
    assert len({float(compiled(states).detach()) for _ in range(4)}) == 4


def test_layers_take_it_for_a_block_and_only_where_it_pays() -> None:
    layer = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0), nn.Dropout1d(0.5))
    outside = nn.Dropout(0.5)
    with pytest.raises(RuntimeError, match="stop"), light_dropouts([layer]):
        assert [type(module) for module in layer] == [LightDropout, nn.Dropout, nn.Dropout1d]
        states = torch.ones(4, 8)
        assert bool((layer[0](states) == 0).any()), "on a CPU it is torch's own"
        layer.eval()
        assert layer[0](states) is states
        raise RuntimeError("stop")
    assert [type(module) for module in layer] == [nn.Dropout, nn.Dropout, nn.Dropout1d]
    assert type(outside) is nn.Dropout
