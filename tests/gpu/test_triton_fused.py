"""Norm, activations, rotary, pooling and embeddings in Triton, on a GPU: against float64, captured, compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

LENGTHS = (300, 1, 0, 64, 147)
TOKENS = sum(LENGTHS)


def kernels(file: str, name: str) -> Callable[..., Any]:
    """A function of a kernel's file, which imports Triton."""
    found: Callable[..., Any] = getattr(import_module(f"burnish.kernels.{file}"), name)
    return found


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cuda")


def norm(prefix: str, states: list[Tensor], **options: Any) -> Tensor:
    out, total = kernels("norm", f"{prefix}add_norm")(*states, eps=1e-5, **options)
    return torch.cat([out, total])


def layer_norm(prefix: str, states: list[Tensor]) -> Tensor:
    return norm(prefix, states)


def rms_norm(prefix: str, states: list[Tensor]) -> Tensor:
    return norm(prefix, states, centred=False, offset=1.0)


def gelu(prefix: str, states: list[Tensor]) -> Tensor:
    out: Tensor = kernels("activation", f"{prefix}activation")(*states, "gelu")
    return out


def geglu(prefix: str, states: list[Tensor]) -> Tensor:
    out: Tensor = kernels("activation", f"{prefix}gated_activation")(*states, "gelu")
    return out


def swiglu(prefix: str, states: list[Tensor]) -> Tensor:
    out: Tensor = kernels("activation", f"{prefix}gated_activation")(*states, "silu")
    return out


def rotary(prefix: str, states: list[Tensor]) -> Tensor:
    angles = torch.linspace(0, 30, TOKENS * 32, device="cuda", dtype=torch.float64).view(TOKENS, 32)
    wide = torch.promote_types(states[0].dtype, torch.float32)
    out: Tensor = kernels("rotary", f"{prefix}rotary")(*states, angles.cos().to(wide), angles.sin().to(wide), 8)
    return out


def pooling(prefix: str, states: list[Tensor]) -> Tensor:
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    pool = kernels("pooling", f"{prefix}packed_pool")
    return torch.cat([pool(*states, bounds, mode, True) for mode in ("mean", "first", "last")])


def embedding(prefix: str, states: list[Tensor]) -> Tensor:
    ids = torch.arange(TOKENS, device="cuda") ** 2 % 50
    out: Tensor = kernels("embedding", f"{prefix}embedding")(ids, *states, 1)
    return out


CASES: dict[str, tuple[Callable[[str, list[Tensor]], Tensor], list[tuple[int, ...]]]] = {
    "layer norm": (layer_norm, [(TOKENS, 768), (768,), (768,), (TOKENS, 768)]),
    "rms norm": (rms_norm, [(TOKENS, 1000), (1000,)]),
    "gelu": (gelu, [(TOKENS, 3072)]),
    "geglu": (geglu, [(TOKENS, 2304)]),
    "swiglu": (swiglu, [(TOKENS, 1000)]),
    "rotary": (rotary, [(TOKENS, 12, 64)]),
    "pooling": (pooling, [(TOKENS, 384)]),
    "embedding": (embedding, [(60, 768)]),
}


def run(prefix: str, name: str, states: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[result, gradients] in `dtype`."""
    operation, _ = CASES[name]
    leaves = [each.detach().to(dtype).requires_grad_() for each in states]
    out = operation(prefix, leaves)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def inputs(name: str) -> tuple[list[Tensor], Tensor]:
    """Float64 inputs and a gradient of the result's shape."""
    torch.manual_seed(0)
    states = [rand(*shape) for shape in CASES[name][1]]
    return states, torch.randn_like(CASES[name][0]("plain_", states))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_as_close_to_float64_as_the_plain_version(name: str, dtype: torch.dtype) -> None:
    states, grad = inputs(name)
    truth = run("plain_", name, states, grad, torch.float64)
    plain = run("plain_", name, states, grad, dtype)
    for found, theirs, exact in zip(run("", name, states, grad, dtype), plain, truth, strict=True):
        assert exact.abs().max() > 1e-2, "nothing to compare"
        room = torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + 2 * room


@pytest.mark.parametrize("name", CASES)
def test_captured_repeated_and_compiled(name: str) -> None:
    states, grad = inputs(name)
    halves = [each.bfloat16().requires_grad_() for each in states]
    back = grad.bfloat16()
    operation, _ = CASES[name]

    def step() -> list[Tensor]:
        out = operation("", halves)
        return [out.detach(), *torch.autograd.grad(out, halves, back)]

    aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for one, other in zip(expected, captured, strict=True):
        assert torch.equal(one, other)
    wrapped = torch.compile(lambda *leaves: operation("", list(leaves)) + 0)
    out = wrapped(*halves)
    compiled = [out.detach(), *torch.autograd.grad(out, halves, back)]
    for one, other in zip(expected, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_each_replay_of_a_norm_drops_others() -> None:
    states = torch.ones(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    add_norm = kernels("norm", "add_norm")

    def step() -> list[Tensor]:
        _, total = add_norm(states, None, eps=1e-5, dropout=0.25)
        return [total.detach(), torch.autograd.grad(total, states, torch.ones_like(total))[0]]

    aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, grad = step()
    seen = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(total, grad), "another mask in the backward"
        assert 0.7 < (total != 0).double().mean() < 0.8
        seen.append(total.clone())
    assert not torch.equal(*seen)
