"""What a forward keeps outside of its layers, in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.core import parking


class Marked(nn.Module):
    """A small model whose saved tensors are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.layers(states)
        return out.tanh()


def gradients(model: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_gradients_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, states = Marked(), torch.randn(4, 8)
    torch.autograd.backward(model(states).square().sum())
    expected = gradients(model)
    copied = list[tuple[int, ...]]()
    empty_like = torch.empty_like

    def counted(value: Tensor, **given: Any) -> Tensor:
        copied.append(tuple(value.shape))
        return empty_like(value, **given)

    monkeypatch.setattr(torch, "empty_like", counted)
    model.zero_grad()
    with parking.on_the_host("cpu", least=1):
        out = model(states)
    torch.autograd.backward(out.square().sum())
    for found, known in zip(gradients(model), expected, strict=True):
        assert torch.equal(found, known) and float(known.abs().max()) > 0
    assert (4, 8) in copied and (4, 3) in copied
    assert (8, 8) not in copied and (3, 8) not in copied, "a weight left the device"


def test_small_tensors_and_other_devices_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object, **more: object) -> Tensor:
        raise AssertionError("a tensor was copied")

    model, states = Marked(), torch.randn(4, 8)
    monkeypatch.setattr(torch, "empty_like", never)
    for device, least in (("cuda", 1), ("cpu", 2**20)):
        with parking.on_the_host(device, least=least):
            torch.autograd.backward(model(states).sum())
    assert gradients(model)
