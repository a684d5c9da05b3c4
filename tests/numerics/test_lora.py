"""LoRA layers as one product with effective weights, against PEFT's way of adding up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from burnish.kernels.linear import joined_linears
from burnish.kernels.lora import (
    Adapter,
    FusedLora,
    adapter_of,
    add_lora,
    effective_weight,
    fused_class,
    lora_linears,
)


def adapter(out: int, width: int, rank: int, dtype: torch.dtype, *, bias: bool = True, size: float = 0.02) -> Adapter:
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    return Adapter(
        weight=(torch.randn(out, width) * 0.1).to(dtype),
        bias=torch.randn(out).to(dtype) if bias else None,
        down=(torch.randn(rank, width) * 0.1).to(masters).requires_grad_(),
        up=(torch.randn(out, rank) * size).to(masters).requires_grad_(),
        scale=2.0,
    )


def dense_of(one: Adapter) -> Tensor:
    assert isinstance(one.weight, Tensor)
    return one.weight


def outputs_and_gradients(made: list[Tensor], inputs: Tensor, adapters: list[Adapter]) -> tuple[list[Tensor], ...]:
    torch.manual_seed(1)
    weights = [inputs, *(matrix for one in adapters for matrix in (one.down, one.up))]
    gradients = torch.autograd.grad(made, weights, [torch.randn_like(part) for part in made])
    return [part.detach() for part in made], list(gradients)


@hypothesis_settings(max_examples=30)
@given(
    widths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3),
    rows=st.integers(1, 30), width=st.integers(1, 40), bias=st.booleans(), batched=st.booleans(),
)  # fmt: skip
def test_the_joined_product_is_what_peft_adds_up(
    widths: list[tuple[int, int]], rows: int, width: int, bias: bool, batched: bool
) -> None:
    torch.manual_seed(0)
    adapters = [adapter(out, width, rank, torch.float64, bias=bias) for out, rank in widths]
    inputs = torch.randn(*((1, rows) if batched else (rows,)), width, dtype=torch.float64, requires_grad=True)
    plain = outputs_and_gradients([add_lora(inputs, one) for one in adapters], inputs, adapters)
    ours = outputs_and_gradients(lora_linears(inputs, adapters), inputs, adapters)
    for theirs, mine in zip([*plain[0], *plain[1]], [*ours[0], *ours[1]], strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_close_to_the_truth_as_peft_s(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapters = [adapter(96, 64, 8, dtype), adapter(48, 64, 4, dtype)]
    inputs = torch.randn(200, 64).to(dtype).requires_grad_()
    exact = [
        Adapter(dense_of(one).double(), None if one.bias is None else one.bias.double(),
                one.down.detach().double().requires_grad_(), one.up.detach().double().requires_grad_(), one.scale)
        for one in adapters
    ]  # fmt: skip
    wide = inputs.detach().double().requires_grad_()
    truth = outputs_and_gradients([add_lora(wide, one) for one in exact], wide, exact)
    plain = outputs_and_gradients([add_lora(inputs, one) for one in adapters], inputs, adapters)
    ours = outputs_and_gradients(lora_linears(inputs, adapters), inputs, adapters)
    for part in range(2):
        for right, theirs, mine in zip(truth[part], plain[part], ours[part], strict=True):
            bound, error = float((theirs - right).norm()), float((mine - right).norm())
            assert float(right.norm()) > 0 and bound > 0
            assert error <= 2 * bound, (part, error, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_an_update_the_effective_weight_is_the_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(64, 48).to(dtype), torch.randn(4, 48), torch.zeros(64, 4)
    assert torch.equal(effective_weight(weight, down, up, 2.0, dtype), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.02, 0.2])
def test_updates_below_half_a_step_are_kept_on_average(dtype: torch.dtype, size: float) -> None:
    """`size` is the update in steps of the dtype: rounding to the nearest would lose all of it."""
    torch.manual_seed(0)
    weight = (1 + torch.rand(512, 512)).to(dtype)  # one binade: steps of one size
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    down, up = torch.ones(1, 512), torch.full((512, 1), size * step)
    made = effective_weight(weight, down, up, 1.0, dtype)
    assert torch.equal((weight.float() + size * step).to(dtype), weight)
    found = float((made.double() - weight.double()).mean()) / step
    # 512 x 512 draws of probability `size`: five standard errors
    assert abs(found - size) < 5 * (size * (1 - size)) ** 0.5 / 512


def test_the_dither_is_the_same_in_every_step_and_over_float32_not_needed() -> None:
    torch.manual_seed(0)
    down, up, weight = torch.randn(4, 32), torch.randn(16, 4), torch.randn(16, 32)
    once, again = (effective_weight(weight.bfloat16(), down, up, 1.0, torch.bfloat16) for _ in range(2))
    assert torch.equal(once, again)
    update = (up.bfloat16() @ down.bfloat16()).float()
    assert torch.equal(effective_weight(weight, down, up, 1.0, torch.bfloat16), (weight + update).bfloat16())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(12, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat(joined_linears(inputs, self.first, self.second), dim=-1)


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=4, target_modules=["first", "second"], **settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model


def fuse(model: Any) -> list[Any]:
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = fused_class(kind)
    return layers


def test_peft_s_layers_join_and_give_what_they_gave() -> None:
    model, inputs = adapted(), torch.randn(5, 12)
    before = model(inputs)
    layers = fuse(model)
    assert all(isinstance(layer, FusedLora) and adapter_of(layer) is not None for layer in layers)
    torch.testing.assert_close(model(inputs), before)
    assert type(model(inputs).grad_fn).__name__ == "CatBackward0"


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"bias": "all"}], ids=["dropout", "dora", "bias"]
)
def test_more_than_plain_lora_is_left_to_peft(settings: dict[str, Any]) -> None:
    model, inputs = adapted(**settings), torch.randn(5, 12)
    model.eval()
    before = model(inputs)
    assert all(adapter_of(layer) is None for layer in fuse(model))
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=0)


def test_an_adapter_switched_off_merged_or_watched_is_left_to_peft() -> None:
    model, inputs = adapted(), torch.randn(5, 12)
    fused, layers = model(inputs), fuse(model)
    with model.disable_adapter():
        assert adapter_of(layers[0]) is None
        assert not torch.allclose(model(inputs), fused)
    calls: list[int] = []
    handle = layers[0].lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    assert adapter_of(layers[0]) is None and adapter_of(layers[1]) is not None
    torch.testing.assert_close(model(inputs), fused)
    handle.remove()
    assert calls == [1]
    model.merge_adapter()
    assert adapter_of(layers[0]) is None
    torch.testing.assert_close(model(inputs), fused, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_product_is_made_in_its_dtype() -> None:
    torch.manual_seed(0)
    one, inputs = adapter(8, 16, 4, torch.float32), torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linears(inputs, [one])[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()  # type: ignore[no-untyped-call]
    assert inputs.grad is not None and inputs.grad.dtype == torch.float32 and one.down.grad is not None
    assert float(one.down.grad.abs().sum()) > 0


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_rows_of_a_joint_product_start_at_16_bytes(rank: int) -> None:
    """FlashAttention loads 16 bytes at once: with rank 4 a row of 3 x 32 + 12 columns made it fault."""
    adapters = [adapter(32, 16, rank, torch.bfloat16) for _ in range(3)]
    inputs = torch.randn(7, 16).bfloat16().requires_grad_()
    out = lora_linears(inputs, adapters)
    assert all(part.stride(0) % 8 == 0 and part.storage_offset() % 8 == 0 for part in out)
    caught: list[Tensor] = []
    inputs.register_hook(caught.append)  # type: ignore[no-untyped-call]
    torch.autograd.backward(out, [torch.randn_like(part) for part in out])
    assert caught[0].stride(0) % 8 == 0 and float(caught[0].abs().sum()) > 0
