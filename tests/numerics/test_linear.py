"""Linear layers joined to one product against each on its own: outputs, gradients, and when they stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.kernels.linear import joined_linears, linears

WIDTHS = ((8, 8, 8), (16, 4, 4), (3,))


def layers(widths: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(12, width, bias=bias, dtype=dtype) for width in widths]


def run(operation: Any, modules: list[nn.Linear], inputs: Tensor) -> list[Tensor]:
    """Outputs, then the gradients of the input and of every parameter."""
    leaf = inputs.clone().requires_grad_()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    out = operation(leaf, *modules)
    sum((part * (index + 1.5)).square().sum() for index, part in enumerate(out)).backward()
    gradients = [tensor.grad for tensor in (leaf, *parameters) if tensor.grad is not None]
    return [*(part.detach() for part in out), *gradients]


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 12)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_equals_the_layers_one_by_one(widths: tuple[int, ...], bias: bool, shape: tuple[int, ...]) -> None:
    modules = layers(widths, bias)
    inputs = torch.randn(shape, dtype=torch.float64)
    expected, found = run(linears, modules, inputs), run(joined_linears, modules, inputs)
    assert len(expected) == len(found) == len(widths) * (3 if bias else 2) + 1
    assert all(float(tensor.abs().max()) > 1e-3 for tensor in expected)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_within_twice_the_error_of_plain_bfloat16() -> None:
    modules, inputs = layers((64, 64, 64), True, torch.float32), torch.randn(33, 12)
    exact = run(linears, modules, inputs)
    halves = [module.to(torch.bfloat16) for module in layers((64, 64, 64), True, torch.float32)]
    plain, ours = (run(operation, halves, inputs.bfloat16()) for operation in (linears, joined_linears))
    for truth, half, found in zip(exact, plain, ours, strict=True):
        allowed = (half.float() - truth).abs().max()
        assert allowed > 0 and (found.float() - truth).abs().max() <= 2 * allowed


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts products, by the rows of their weights."""
    plain, seen = torch.nn.functional.linear, list[int]()

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(weight.shape[0])
        return plain(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return seen


def test_three_products_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    joined_linears(torch.ones(2, 12, dtype=torch.float64), *layers((8, 8, 8), True))
    assert seen == [24]


@pytest.mark.parametrize("kind", ["subclass", "hook", "pre-hook", "bound forward"])
def test_what_is_more_than_a_linear_layer_is_called(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers((8, 8, 8), True)
    heard: list[str] = []

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            heard.append("called")
            return nn.Linear.forward(self, input)

    if kind == "subclass":
        modules[1].__class__ = Scaled
    elif kind == "hook":
        modules[1].register_forward_hook(lambda *_: heard.append("called"))
    elif kind == "pre-hook":
        modules[1].register_forward_pre_hook(lambda *_: heard.append("called"))
    else:
        monkeypatch.setattr(modules[1], "forward", Scaled.forward.__get__(modules[1]))
    joined_linears(torch.ones(2, 12, dtype=torch.float64), *modules)
    assert heard == ["called"]
