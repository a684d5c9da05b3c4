"""Packed attention, one text at a time: what it needs grows with the longest text squared, not with all texts in a grid.

For batches in which one text is far longer than the others. Where lengths are alike, the grid of Burnish's own is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from burnish.core.contracts import KernelSpec, Needs
from burnish.core.hookspecs import hookimpl
from torch import Tensor
from torch.nn import functional


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The operation `packed_attention`, with all of its options: (T, H, D) in, (T, H, D) out."""
    share = query.shape[1] // key.shape[1]
    out = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        states = (query[start:end], key[start:end], value[start:end])
        q, k, v = (part.transpose(0, 1)[None] for part in states)
        mask = _mask(end - start, max_length, causal, window, bias, query)
        keys, values = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        attended = functional.scaled_dot_product_attention(q, keys, values, mask, dropout, scale=scale)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def _mask(
    length: int, longest: int, causal: bool, window: int | None, bias: Tensor | None, like: Tensor
) -> Tensor | None:
    """What is added to the scores of one text, or which key each query sees; None if all see all."""
    if not causal and window is None and bias is None:
        return None
    place = torch.arange(length, device=like.device)
    distance = place - place[:, None]
    seen = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance.abs() < window)
    if bias is None:
        return seen
    added = bias.index_select(1, (distance + longest - 1).flatten()).view(-1, length, length)
    return added.to(like.dtype).masked_fill(~seen, -torch.inf)


def load() -> Callable[..., Any]:
    """Called when the operation is first needed."""
    return packed_attention


@hookimpl
def burnish_register_kernels() -> list[KernelSpec]:
    """What this plugin offers; pyproject.toml claims the same."""
    # Below the reference's 0: it is used where the plugin is named, and never because it is installed.
    needs = Needs(devices=("cpu",))
    return [KernelSpec(operation="packed_attention", name="text-by-text", load=load, needs=needs, priority=-1)]
