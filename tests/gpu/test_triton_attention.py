"""Triton's attention with a bias by distance, on a GPU: nearness to float64, dropout, CUDA graphs, torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import attention

pytestmark = pytest.mark.gpu

flash_packed_attention: Callable[..., Tensor] = attention.flash_packed_attention
packed_attention: Callable[..., Tensor] = attention.packed_attention
RAGGED = (5, 0, 1, 300, 64, 17)
NAMES = ("output", "query", "key", "value", "bias")


def biased_attention(*arguments: Any, **options: Any) -> Tensor:
    from burnish.kernels import biased_attention as module

    operation: Callable[..., Tensor] = module.biased_attention
    return operation(*arguments, **options)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def inputs(lengths: tuple[int, ...], heads: int, groups: int, size: int) -> list[Tensor]:
    """Query, key, value, bias and the gradient that comes back, all float64."""
    draw = torch.Generator("cuda").manual_seed(0)
    tokens, width = sum(lengths), 2 * max(lengths) - 1
    shapes = [(tokens, heads, size), *[(tokens, groups, size)] * 2, (heads, width), (tokens, heads, size)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64, device="cuda") for shape in shapes]


def run(
    operation: Any, states: list[Tensor], dtype: torch.dtype, lengths: tuple[int, ...], **options: Any
) -> list[Tensor]:
    """[output, dq, dk, dv, dbias] in `dtype`, widened to float64."""
    leaves = [state.detach().to(dtype).requires_grad_() for state in states[:4]]
    out = operation(*leaves[:3], bounds(lengths), max(lengths), bias=leaves[3], **options)
    assert out.dtype == dtype and out.shape == leaves[0].shape
    out.backward(states[4].to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


SHAPES = (
    (torch.bfloat16, 12, 12, 64),
    (torch.bfloat16, 4, 2, 32),
    (torch.bfloat16, 2, 2, 16),
    (torch.bfloat16, 3, 3, 128),
    (torch.bfloat16, 2, 1, 256),
    (torch.float16, 12, 12, 64),
    (torch.float32, 4, 2, 64),
    (torch.float32, 3, 3, 128),
    (torch.float32, 2, 1, 256),
)


@pytest.mark.parametrize("dtype, heads, groups, size", SHAPES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 40, "scale": 0.2}], ids=str)
def test_as_close_to_float64_as_the_plain_version(
    dtype: torch.dtype, heads: int, groups: int, size: int, options: dict[str, Any]
) -> None:
    for lengths in (RAGGED, (1,), (128, 128)):  # together, since each test may compile its kernels in its own process
        states = inputs(lengths, heads, groups, size)
        truth = run(packed_attention, states, torch.float64, lengths, **options)
        plain = run(packed_attention, states, dtype, lengths, **options)
        ours = run(biased_attention, states, dtype, lengths, **options)
        assert len(truth) == len(plain) == len(ours) == 5
        # A lone token's gradients cancel to 0, in the plain version exactly: two roundings of the largest are allowed.
        # In float32 a weight is 2^(score - log of their sum), both rounded at about 8: 8 roundings, measured on a CPU.
        roundings = 16 if dtype == torch.float32 else 2
        room = roundings * torch.finfo(dtype).eps * max(each.abs().max().item() for each in truth)
        for name, found, theirs, exact in zip(NAMES, ours, plain, truth, strict=True):
            assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max() + room, (name, lengths)


def test_a_bias_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the plain version ran")

    monkeypatch.setattr(attention, "packed_attention", refuse)
    states = inputs(RAGGED, 4, 4, 32)
    for dtype in (torch.bfloat16, torch.float32):
        run(flash_packed_attention, states, dtype, RAGGED)
    with pytest.raises(AssertionError, match="the plain version ran"):
        run(flash_packed_attention, states, torch.float64, RAGGED)


def test_gradients_are_the_same_in_every_run() -> None:
    states = inputs((300, 200, 100), 4, 4, 64)
    first, second = (run(biased_attention, states, torch.bfloat16, (300, 200, 100)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def dropped_like(kept: Tensor, states: list[Tensor], length: int, share: float) -> list[Tensor]:
    """The plain formula in float64 with the mask that was drawn: [output, dq, dk, dv, dbias] of one text."""
    leaves = [state.detach().clone().requires_grad_() for state in states[:4]]
    query, key, value = (leaf.transpose(0, 1) for leaf in leaves[:3])
    scores = query @ key.transpose(1, 2) / query.shape[2] ** 0.5 + attention.by_distance(leaves[3], length)[0]
    out = (scores.softmax(-1) * kept.transpose(0, 1) / (1 - share) @ value).transpose(0, 1)
    out.backward(states[4])
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("length", [64, 200])
def test_dropout_is_the_plain_formula_with_the_mask_that_was_drawn(length: int) -> None:
    """Heads of 256 show the weights of 200 keys at once, by a value that is 1 at its key's place."""
    share = 0.2
    states = inputs((length,), 2, 2, 256)
    shown = torch.eye(256, device="cuda")[:length, None].expand(-1, 2, -1).contiguous()
    query, key, _, bias, _ = (state.float() for state in states)
    torch.manual_seed(5)
    weights = biased_attention(query, key, shown, bounds((length,)), length, bias=bias, dropout=share)
    kept = weights[:, :, :length] != 0
    assert abs(kept.double().mean() - (1 - share)) < 0.02
    torch.manual_seed(5)
    found = run(biased_attention, states, torch.float32, (length,), dropout=share)
    for name, ours, theirs in zip(NAMES, found, dropped_like(kept, states, length, share), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)
        assert theirs.abs().max() > 0.1


def test_each_replay_of_a_graph_drops_others_and_follows_its_inputs() -> None:
    lengths = (100, 28)
    states = [state.bfloat16() for state in inputs(lengths, 4, 4, 64)]
    leaves = [state.requires_grad_() for state in states[:4]]
    where = bounds(lengths)

    def step(dropout: float) -> list[Tensor]:
        out = biased_attention(*leaves[:3], where, 128, bias=None, dropout=dropout)
        return [out.detach(), *torch.autograd.grad(out, leaves[:3], states[4])]

    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):
        step(0.1)
        step(0.0)
    torch.cuda.synchronize()
    for dropout in (0.1, 0.0):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(dropout)
        draws = []
        for _ in range(3):
            graph.replay()
            draws.append([result.clone() for result in results])
        for one, other in itertools.combinations(draws, 2):
            for first, second in zip(one, other, strict=True):
                assert torch.equal(first, second) == (dropout == 0.0)
    with torch.no_grad():
        leaves[2].zero_()
        where.copy_(bounds((50, 78)))
    graph.replay()
    assert results[0].abs().max() == 0
    truth = torch.autograd.grad(packed_attention(*leaves[:3], where, 128), leaves[2], states[4])[0]
    torch.testing.assert_close(results[3], truth, rtol=0.05, atol=0.05)


def test_compiled_without_a_break() -> None:
    states = inputs(RAGGED, 4, 4, 64)

    def layer(*arguments: Any, **options: Any) -> Tensor:
        return flash_packed_attention(*arguments, **options) * 2

    def plain(*arguments: Any, **options: Any) -> Tensor:
        return biased_attention(*arguments, **options) * 2

    found = run(torch.compile(layer, fullgraph=True), states, torch.bfloat16, RAGGED)
    for ours, theirs in zip(found, run(plain, states, torch.bfloat16, RAGGED), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    compiled = torch.compile(layer, fullgraph=True)
    leaves = [state.bfloat16() for state in states[:4]]
    draws = [compiled(*leaves[:3], bounds(RAGGED), 300, bias=leaves[3], dropout=0.3) for _ in range(2)]
    assert not torch.equal(*draws)
