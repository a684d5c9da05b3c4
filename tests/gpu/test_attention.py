"""FlashAttention's kernels against the plain packed attention: outputs and gradients in half precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import attention
from burnish.kernels.attention import flash_packed_attention, packed_attention

pytestmark = pytest.mark.gpu

RAGGED = (5, 1, 130, 64, 17)


def run(
    operation: Any, states: list[Tensor], dtype: torch.dtype, lengths: tuple[int, ...], **options: Any
) -> list[Tensor]:
    """[output, dq, dk, dv] in `dtype` on the GPU, widened to float64."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    leaves = [state.detach().to(dtype).requires_grad_() for state in states[:3]]
    out = operation(*leaves, cu_seqlens, max(lengths), **options)
    assert out.dtype == dtype and out.shape == leaves[0].shape
    out.backward(states[3].to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def inputs(lengths: tuple[int, ...], heads: int, groups: int, size: int) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64, device="cuda") for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [RAGGED, (64,), (1,), (32, 32, 32), (128, 128, 128)], ids=str)
@pytest.mark.parametrize("heads, groups, size", [(12, 12, 32), (8, 2, 64), (16, 8, 128), (3, 1, 256)])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.2}, {"causal": True}, {"window": 1}, {"window": 16}, {"causal": True, "window": 16}],
    ids=str,
)
def test_flash_is_as_close_to_float64_as_the_plain_version(
    dtype: torch.dtype, lengths: tuple[int, ...], heads: int, groups: int, size: int, options: dict[str, Any]
) -> None:
    states = inputs(lengths, heads, groups, size)
    truth = run(packed_attention, states, torch.float64, lengths, **options)
    plain = run(packed_attention, states, dtype, lengths, **options)
    flash = run(flash_packed_attention, states, dtype, lengths, **options)
    assert len(truth) == len(plain) == len(flash) == 4
    for name, found, half, exact in zip("oqkv", flash, plain, truth, strict=True):
        room = torch.finfo(dtype).eps * exact.abs().max()
        assert (found - exact).abs().max() <= 2 * (half - exact).abs().max() + 2 * room, name


def test_half_precision_never_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the plain version ran")

    monkeypatch.setattr(attention, "packed_attention", refuse)
    states = inputs(RAGGED, 4, 4, 32)
    run(flash_packed_attention, states, torch.bfloat16, RAGGED)
    with pytest.raises(AssertionError, match="the plain version ran"):
        run(flash_packed_attention, states, torch.float32, RAGGED)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="FlashAttention")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_texts_of_one_length_go_through_cudnn_a_view_of_a_joint_product_too(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    dense = attention._dense_attention

    def watched(*arguments: Any) -> Tensor:
        taken.append(arguments[3])
        return dense(*arguments)

    monkeypatch.setattr(attention, "_dense_attention", watched)
    lengths, heads, size = (128, 128, 128), 4, 64
    bounds = torch.arange(0, 385, 128, dtype=torch.int32, device="cuda")
    joint = torch.randn(384, 3 * heads * size + 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    states = [part.view(384, heads, size) for part in torch.split(joint[:, : 3 * heads * size], heads * size, dim=1)]
    query, key, value = states
    out = flash_packed_attention(query, key, value, bounds, 128, dropout=dropout)
    (grad,) = torch.autograd.grad(out.square().sum(), joint)
    assert taken == [128] and bool(grad[:, : 3 * heads * size].any(1).all()) and not bool(grad[:, -32:].any())
    if dropout == 0.0:
        query, key, value = (each.detach().double() for each in states)
        exact = packed_attention(query, key, value, bounds, 128)
        assert float((out.detach().double() - exact).abs().max()) < 0.02
    run(flash_packed_attention, inputs((128, 64), 4, 4, 64), torch.bfloat16, (128, 64))
    assert taken == [128], "ragged texts go another way"
    run(flash_packed_attention, inputs(lengths, 8, 2, 64), torch.bfloat16, lengths)
    assert taken == [128, 128], "grouped heads are taken as they are"


def test_float32_goes_the_plain_way_exactly() -> None:
    states = inputs(RAGGED, 8, 2, 32)
    options = {"causal": True, "window": 9, "scale": 0.3}
    plain = run(packed_attention, states, torch.float32, RAGGED, **options)
    flash = run(flash_packed_attention, states, torch.float32, RAGGED, **options)
    for found, expected in zip(flash, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_forward_and_backward() -> None:
    states = inputs((64, 64), 4, 4, 32)
    states[2] = torch.ones_like(states[2])  # the output is the sum of the weights that were kept
    torch.manual_seed(0)
    dropped = run(flash_packed_attention, states, torch.float16, (64, 64), dropout=0.3)
    kept = run(flash_packed_attention, states, torch.float16, (64, 64))
    torch.testing.assert_close(kept[0], torch.ones_like(kept[0]), rtol=0, atol=2e-3)
    assert dropped[0].std() > 0.05 and abs(dropped[0].mean() - 1) < 0.02
    assert all(torch.isfinite(values).all() and values.abs().max() > 0 for values in dropped)
