"""Weights in 4 and 8 bits: bit for bit bitsandbytes', and a LoRA layer over them against PEFT's way in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from burnish.kernels import nf4
from burnish.kernels.lora import Adapter, lora_linears

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this system")
functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def four(weight: Tensor, *, nested: bool = True, kind: str = "nf4") -> Any:
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=nested)
    return layer.to("cpu")


def eight(weight: Tensor) -> Any:
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def stored(layer: Any) -> nf4.Stored:
    found = nf4.stored(layer)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(96, 64), (33, 128), (7, 24), (300, 384)])
def test_four_bits_are_bitsandbytes_numbers(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = four(torch.randn(shape).to(dtype), nested=nested)
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = stored(layer)
    assert weight.nested == nested and not weight.eight and (weight.rows, weight.columns) == shape
    assert expected.dtype == dtype and expected.unique().numel() > 16
    assert torch.equal(nf4.dense(weight).to(dtype), expected)
    assert torch.equal(nf4.effective_weight(weight, None, None, 1.0, dtype), expected)


def test_eight_bits_are_bitsandbytes_numbers_before_a_call_and_after() -> None:
    torch.manual_seed(0)
    layer = eight(torch.randn(40, 64))
    before = nf4.dense(stored(layer))
    layer(torch.randn(3, 64))
    after = stored(layer)
    assert after.eight and torch.equal(nf4.dense(after), before)
    scales = layer.state.SCB
    assert torch.equal(before, functional.int8_vectorwise_dequant(layer.state.CB, scales)) and scales.shape == (40,)


def test_other_layers_hold_nothing_in_few_bits() -> None:
    assert nf4.stored(nn.Linear(4, 4)) is None and nf4.stored(nn.Embedding(4, 4)) is None
    assert nf4.stored(four(torch.randn(64, 64), kind="fp4")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = stored(four(torch.randn(64, 128)))
    down, up = torch.randn(8, 128) * 0.1, torch.randn(64, 8) * 0.1
    exact = nf4.dense(weight).double() + 0.5 * up.double() @ down.double()
    found = nf4.effective_weight(weight, down, up, 0.5, dtype)
    step = torch.finfo(dtype).eps * exact.abs() / 2  # half a step of the dtype, of the binade's smallest number
    assert (found.double() - exact).abs().le(step * 1.001 + 1e-6).all()
    assert not torch.equal(found, nf4.effective_weight(weight, None, None, 1.0, dtype))


def test_small_updates_are_kept_on_average() -> None:
    """An update of a tenth of a step of bfloat16: rounded to the nearest, each number loses it or gains a step."""
    torch.manual_seed(0)
    weight = stored(four(1 + torch.rand(512, 512)))
    plain = nf4.dense(weight)
    inside = (plain > 1) & (plain < 2)  # one binade: steps of one size
    step = 2.0**-7
    down, up = torch.ones(1, 512), torch.full((512, 1), 0.1 * step)
    before = nf4.effective_weight(weight, None, None, 1.0, torch.bfloat16)
    after = nf4.effective_weight(weight, down, up, 1.0, torch.bfloat16)
    assert int(inside.sum()) > 1e5
    moved = float((after.double() - before.double())[inside].mean()) / step
    assert moved == pytest.approx(0.1, rel=0.3)


def pair(out: int, width: int, rank: int, weight: nf4.Stored | Tensor, dtype: torch.dtype, bias: bool) -> Adapter:
    draw = torch.Generator().manual_seed(out + rank)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    down = (torch.randn(rank, width, generator=draw) * 0.1).to(masters).requires_grad_()
    up = (torch.randn(out, rank, generator=draw) * 0.1).to(masters).requires_grad_()
    return Adapter(weight, torch.randn(out, generator=draw).to(dtype) if bias else None, down, up, 2.0)


def outputs_and_gradients(inputs: Tensor, adapters: list[Adapter], operation: Any = lora_linears) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    made = operation(inputs, adapters)
    leaves = [inputs, *(matrix for one in adapters for matrix in (one.down, one.up))]
    grads = [torch.randn(part.shape, generator=draw).to(part.dtype) for part in made]
    return [part.detach() for part in made] + list(torch.autograd.grad(made, leaves, grads))


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3),
    rows=st.integers(1, 20), width=st.sampled_from([8, 24, 64, 96]), bias=st.booleans(), bits=st.sampled_from([4, 8]),
)  # fmt: skip
def test_a_layer_over_few_bits_is_one_over_the_numbers_that_they_stand_for(
    widths: list[tuple[int, int]], rows: int, width: int, bias: bool, bits: int
) -> None:
    torch.manual_seed(0)
    quantise = four if bits == 4 else eight
    weights = [stored(quantise(torch.randn(out, width) * 0.1)) for out, _ in widths]
    inputs = torch.randn(rows, width)
    ours = [pair(out, width, rank, weight, torch.float32, bias)
            for (out, rank), weight in zip(widths, weights, strict=True)]  # fmt: skip
    exact = [
        Adapter(nf4.dense(weight).double(), None if one.bias is None else one.bias.double(),
                one.down.detach().double().requires_grad_(), one.up.detach().double().requires_grad_(), one.scale)
        for one, weight in zip(ours, weights, strict=True)
    ]  # fmt: skip
    found = outputs_and_gradients(inputs.clone().requires_grad_(), ours)
    expected = outputs_and_gradients(inputs.double().requires_grad_(), exact)
    for mine, truth in zip(found, expected, strict=True):
        assert mine.shape == truth.shape
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)
    assert all(float(truth.abs().sum()) > 0 for truth in expected[: len(widths) + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_over_four_are_as_close_to_the_truth_as_peft_s(dtype: torch.dtype) -> None:
    """PEFT, in autocast as in training, rounds the dequantised weight, the adapter's outputs and the sum; the bound is
    twice its error."""
    torch.manual_seed(0)
    weights = [stored(four(torch.randn(out, 64) * 0.1)) for out in (96, 48)]
    inputs = torch.randn(200, 64).to(dtype)
    ours = [pair(weight.rows, 64, 8, weight, dtype, bias=True) for weight in weights]
    exact = [
        Adapter(nf4.dense(weight).double(), one.bias.double(), one.down.detach().double().requires_grad_(),
                one.up.detach().double().requires_grad_(), one.scale)
        for one, weight in zip(ours, weights, strict=True) if one.bias is not None
    ]  # fmt: skip
    truth = outputs_and_gradients(inputs.double().requires_grad_(), exact)
    mine = outputs_and_gradients(inputs.clone().requires_grad_(), ours)
    with torch.autocast("cpu", dtype):
        plain = outputs_and_gradients(inputs.clone().requires_grad_(), ours, peft_s)
    for right, theirs, own in zip(truth, plain, mine, strict=True):
        bound, error = float((theirs.double() - right).norm()), float((own.double() - right).norm())
        assert float(right.norm()) > 0 and bound > 0
        assert error <= 2 * bound, (error, bound)


def peft_s(inputs: Tensor, adapters: list[Adapter]) -> list[Tensor]:
    """What PEFT's layers add up under autocast, which casts what goes into every product."""
    made = []
    for one in adapters:
        assert isinstance(one.weight, nf4.Stored)
        plain = nn.functional.linear(inputs, nf4.dense(one.weight), one.bias)
        low = nn.functional.linear(inputs, one.down)
        made.append(plain + nn.functional.linear(low, one.up) * one.scale)
    return made


def test_some_in_few_bits_and_some_not_is_refused() -> None:
    some = [pair(8, 64, 2, torch.randn(8, 64), torch.float32, False)]
    some += [pair(8, 64, 2, stored(four(torch.randn(8, 64))), torch.float32, False)]
    with pytest.raises(ValueError, match="some of the weights are in few bits"):
        lora_linears(torch.randn(3, 64), some)


def test_the_operations_keep_to_what_they_are_registered_as() -> None:
    torch.manual_seed(0)
    weights = [stored(four(torch.randn(out, 64))) for out in (16, 8)]
    tensors, sizes = nf4.flatten(weights)
    assert nf4.unflatten(tensors, sizes) == weights or all(
        torch.equal(one.data, other.data) for one, other in zip(nf4.unflatten(tensors, sizes), weights, strict=True)
    )
    downs, ups = [torch.randn(4, 64), torch.randn(2, 64)], [torch.randn(16, 4), torch.randn(8, 2)]
    like = torch.randn(3, 64)
    arguments = (tensors, sizes, downs, ups, [1.0, 2.0], 2)
    check: Any = torch.library.opcheck
    check(nf4.stored_rows, (*arguments, like))
    check(nf4.stored_columns, (*arguments, torch.randn(3, 24)))
    rows, columns = nf4.stored_rows(*arguments, like), nf4.stored_columns(*arguments, torch.randn(3, 24))
    assert rows.shape == (24 + 6 + 2, 64) and columns.shape == (24, 64 + 6 + 2)
    assert torch.equal(rows[:24], columns[:, :64]) and torch.equal(rows[24:30], torch.cat(downs))
    assert torch.equal(columns[:16, 64:68], ups[0]) and torch.equal(columns[16:, 68:70], ups[1] * 2)
    for zeros in (rows[30:], columns[:, 70:], columns[16:, 64:68], columns[:16, 68:70]):
        assert zeros.numel() and not zeros.any()
