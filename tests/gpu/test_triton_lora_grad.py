"""Gradients of LoRA's small matrices on a GPU, against float64 and beside the same products of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu


def drawn(rows: int, width: int, out: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dy, x A^T and B."""
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, width), (rows, out), (rows, rank), (out, rank))
    return [torch.randn(shape, generator=draw, device="cuda").to(dtype) for shape in shapes]


SHAPES = ((4096, 1024, 1024), (1000, 384, 1536), (33, 768, 100), (1, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [4, 16, 32, 64, 96])
def test_as_close_to_float64_as_products_of_pytorch(rank: int, dtype: torch.dtype) -> None:
    from burnish.kernels import lora_grad

    for shape in SHAPES:
        states = drawn(*shape, rank, dtype)
        x, dy, seen, up = (state.double() for state in states)
        back = 0.5 * dy @ up
        truth = back, back.t() @ x, 0.5 * dy.t() @ seen
        arguments: Any = (*states, 0.5)
        ours = lora_grad.lora_gradients(*arguments)
        x, dy, seen, up = states
        half = 0.5 * (dy @ up)
        plain = half, half.t() @ x, 0.5 * (dy.t() @ seen)
        for name, found, theirs, exact in zip(("dy B", "dA", "dB"), ours, plain, truth, strict=True):
            allowed = (theirs.double() - exact).abs().max()
            room = torch.finfo(torch.float32).eps * exact.abs().max()
            assert (found.double() - exact).abs().max() <= 2 * allowed + 2 * room, (name, shape)
        assert all(torch.equal(one, two) for one, two in zip(ours, lora_grad.lora_gradients(*arguments), strict=True))


def test_captured_and_compiled() -> None:
    from burnish.kernels import lora_grad

    arguments: Any = (*drawn(2048, 512, 512, 16, torch.bfloat16), 0.5)
    expected = lora_grad.lora_gradients(*arguments)
    compiled = torch.compile(lora_grad.lora_gradients, fullgraph=True)(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lora_grad.lora_gradients(*arguments)
    graph.replay()
    for one, two, three in zip(expected, compiled, captured, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three) and one.abs().max() > 0
