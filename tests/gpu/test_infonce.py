"""Tiled InfoNCE on a GPU: against float64, in a CUDA graph, and its memory at a batch of 65,536."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels.infonce import DIRECTIONS, tiled_infonce

pytestmark = pytest.mark.gpu

GIB = 2**30
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"similarity": "dot", "scale": 0.5},
    BOTH,
    {"directions": DIRECTIONS},
    {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 5.0},
]


def texts(rows: int, size: int, columns: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(rows)
    return [torch.randn(rows, size, generator=draw, device="cuda").to(dtype) for _ in range(columns + 1)]


def run(embeddings: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    leaves = [values.clone().requires_grad_() for values in embeddings]
    loss = tiled_infonce(leaves[0], leaves[1:], **options).mean()
    torch.autograd.backward(loss)
    return loss.detach().double(), torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).double()


def apart(found: Tensor, expected: Tensor) -> float:
    assert float(expected.abs().max()) > 0
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)], ids=str)
def test_float32_products(dtype: torch.dtype, bound: float, options: dict[str, Any]) -> None:
    embeddings = texts(700, 64, 2, dtype)
    exact = run([values.double() for values in embeddings], **options)
    ours = run(embeddings, tile_bytes=2**18, **options)
    assert apart(ours[0], exact[0]) < 1e-5 and apart(ours[1], exact[1]) < bound


def test_tf32_is_as_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is off; where the user switches it on, scores are as exact as those of any float32 product."""
    embeddings = texts(2048, 256)
    exact = run([values.double() for values in embeddings])
    assert not torch.backends.cuda.matmul.allow_tf32
    assert apart(run(embeddings)[0], exact[0]) < 1e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert 0 < apart(run(embeddings)[1], exact[1]) < 1e-2


def test_it_is_captured_and_replayed() -> None:
    options: dict[str, Any] = {**BOTH, "tile_bytes": 2**16}
    leaves = [values.requires_grad_() for values in texts(300, 32)]

    def step() -> Tensor:
        loss = tiled_infonce(leaves[0], leaves[1:], **options).mean()
        torch.autograd.backward(loss)
        return loss.detach()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    others = texts(300, 32)[::-1]
    with torch.no_grad():
        for leaf, values in zip(leaves, others, strict=True):
            leaf.copy_(values)
            assert leaf.grad is not None
            leaf.grad.zero_()
    graph.replay()
    expected = run(others, **options)
    assert apart(loss.double(), expected[0]) < 1e-6
    assert apart(torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).double(), expected[1]) < 1e-5


def peak(step: Callable[[], Any]) -> int:
    """Bytes above what was held before, at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("options", [{}, BOTH], ids=["one direction", "both"])
def test_memory_of_a_batch_of_65536(options: dict[str, Any]) -> None:
    """Under 3 GiB over the inputs, gradients included: one matrix of scores alone would be 16."""
    leaves = [values.requires_grad_() for values in texts(65_536, 1024)]
    found: list[Tensor] = []

    def step() -> None:
        loss = tiled_infonce(leaves[0], leaves[1:], **options).mean()
        torch.autograd.backward(loss)
        found.append(loss.detach())

    used = peak(step)
    print(f"\n{used / GIB:.2f} GiB over the inputs")
    assert used < 3 * GIB
    assert torch.isfinite(found[0]) and all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)
