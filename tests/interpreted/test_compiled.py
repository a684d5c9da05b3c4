"""A layer around the attention kernels under torch.compile: what registered shapes, strides and gradients are worth.

Inductor believes what an operation's fake version says of its results, strides too, and stops where they differ.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from burnish.kernels.biased_attention import biased_attention

Weights = list[Tensor]


def layer(weights: Weights, ids: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Two heads of 16, bias by distance and dropout, then a norm, from ids to (tokens, 32)."""
    table, product, scale, shift, bias = weights
    states = functional.embedding(ids, table)
    joined = (states @ product.t() / 32**0.5).view(-1, 6, 16)  # scores of about 1: no rounding to magnify
    query, key, value = torch.split(joined, 2, dim=1)
    out = biased_attention(query, key, value, bounds, longest, bias=bias, dropout=0.3).reshape(-1, 32)
    return functional.layer_norm(out + states, (32,), scale, shift)


def run(operation: Any, lengths: tuple[int, ...]) -> list[Tensor]:
    """[states, and the weights' gradients]."""
    draw = torch.Generator().manual_seed(0)
    longest, tokens = max(lengths), sum(lengths)
    shapes = ((20, 32), (96, 32), (32,), (32,), (2, 2 * longest - 1))
    weights = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    ids = torch.randint(0, 20, (tokens,), generator=draw)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    torch.manual_seed(1)
    out = operation(weights, ids, bounds, longest)
    grad = torch.randn(out.shape, generator=draw)
    return [out.detach(), *torch.autograd.grad(out, weights, grad)]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # PyTorch's own, from inductor
def test_a_compiled_layer_is_the_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(layer, fullgraph=True, options={"fallback_random": True})
    for lengths in ((5, 9), (12, 3, 7)):  # the second time with shapes that are not known beforehand
        for found, expected in zip(run(compiled, lengths), run(layer, lengths), strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
