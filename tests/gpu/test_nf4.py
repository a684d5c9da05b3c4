"""Weights in 4 and 8 bits on a CUDA device: bitsandbytes' numbers bit for bit, nothing dense kept between passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.kernels import nf4
from burnish.kernels.lora import Adapter, lora_linears

pytestmark = pytest.mark.gpu
bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((384, 1536), (4096, 1024), (9728, 2560), (33, 128), (7, 24))


def four(weight: Tensor, *, nested: bool = True) -> Any:
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    return layer.to("cuda")


def stored(layer: Any) -> nf4.Stored:
    found = nf4.stored(layer)
    assert found is not None and found.data.is_cuda
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_bitsandbytes_numbers(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    layer = four(torch.randn(shape).to(dtype), nested=nested)
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = stored(layer)
    assert expected.dtype == dtype and torch.equal(nf4.effective_weight(weight, None, None, 1.0, dtype), expected)
    assert torch.equal(nf4.dense(weight).to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_the_update_is_added_before_rounding(rank: int, dtype: torch.dtype) -> None:
    weight = stored(four(torch.randn(1030, 512)))
    down, up = torch.randn(rank, 512, device="cuda") * 0.1, torch.randn(1030, rank, device="cuda") * 0.1
    exact = nf4.dense(weight).double() + 0.5 * up.double() @ down.double()
    found = nf4.effective_weight(weight, down, up, 0.5, dtype)
    step = torch.finfo(dtype).eps / 2 * exact.abs()
    # What the sum's terms add up to: each factor is rounded to tf32, 2^-11 off, or to three of it, 2^-22; float32 sums.
    update = 0.5 * up.double().abs() @ down.double().abs()
    room = 2.0 ** (-18 if dtype == torch.float32 else -9) * update
    assert (found.double() - exact).abs().le(step * 1.01 + room + 1e-7).all()
    assert room.max() < 0.02 * update.max()


def test_eight_bits_are_bitsandbytes_numbers_before_a_call_and_after() -> None:
    layer: Any = bnb.nn.Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(1024, 512), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cuda")
    before = nf4.dense(stored(layer))
    layer(torch.randn(4, 512, device="cuda", dtype=torch.float16))
    after = stored(layer)
    assert after.eight and torch.equal(nf4.dense(after), before)
    assert torch.equal(before, functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB))
    assert torch.equal(nf4.effective_weight(after, None, None, 1.0, torch.float32), before)


def products(inputs: Tensor, adapters: list[Adapter], operation: Any) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(1)
    made = operation(inputs, adapters)
    leaves = [inputs, *(matrix for one in adapters for matrix in (one.down, one.up))]
    grads = [torch.randn(part.shape, generator=draw, device="cuda", dtype=torch.float32).to(part) for part in made]
    return [part.detach() for part in made] + list(torch.autograd.grad(made, leaves, grads))


def peft_s(inputs: Tensor, adapters: list[Adapter]) -> list[Tensor]:
    made = []
    for one in adapters:
        weight = nf4.dense(one.weight) if isinstance(one.weight, nf4.Stored) else one.weight
        low = nn.functional.linear(inputs, one.down)
        made.append(nn.functional.linear(inputs, weight, one.bias) + nn.functional.linear(low, one.up) * one.scale)
    return made


def test_joined_layers_are_as_close_to_the_truth_as_peft_s_under_autocast() -> None:
    torch.manual_seed(0)
    weights = [stored(four(torch.randn(out, 512) * 0.05)) for out in (512, 256, 256)]
    adapters = [
        Adapter(weight, torch.randn(weight.rows, device="cuda"), (torch.randn(32, 512, device="cuda") * 0.05),
                torch.randn(weight.rows, 32, device="cuda") * 0.05, 2.0)
        for weight in weights
    ]  # fmt: skip
    for one in adapters:
        one.down.requires_grad_()
        one.up.requires_grad_()
    exact = [
        Adapter(nf4.dense(weight).double(), one.bias.double(), one.down.detach().double().requires_grad_(),
                one.up.detach().double().requires_grad_(), one.scale)
        for one, weight in zip(adapters, weights, strict=True) if one.bias is not None
    ]  # fmt: skip
    inputs = torch.randn(3000, 512, device="cuda").bfloat16()
    truth = products(inputs.double().requires_grad_(), exact, peft_s)
    with torch.autocast("cuda", torch.bfloat16):
        plain = products(inputs.clone().requires_grad_(), adapters, peft_s)
        ours = products(inputs.clone().requires_grad_(), adapters, lora_linears)
    for right, theirs, own in zip(truth, plain, ours, strict=True):
        bound, error = float((theirs.double() - right).norm()), float((own.double() - right).norm())
        assert float(right.norm()) > 0 and 0 < error <= 2 * bound, (error, bound)


def test_no_dense_weight_is_kept_for_the_backward() -> None:
    weight = stored(four(torch.randn(4096, 1024)))
    one = Adapter(
        weight, None, torch.randn(32, 1024, device="cuda", requires_grad=True),
        torch.randn(4096, 32, device="cuda", requires_grad=True), 1.0,
    )  # fmt: skip
    kept: list[int] = []

    def count(value: Tensor) -> Tensor:
        kept.append(value.untyped_storage().nbytes())
        return value

    inputs = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        out = lora_linears(inputs, [one])[0]
    assert kept and max(kept) <= 4096 * 1024 // 2, "more than 4 bits a number"
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None and float(inputs.grad.abs().sum()) > 0
