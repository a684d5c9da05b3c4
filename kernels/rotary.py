"""Rotary positions (Su et al. 2021, section 3.4.2) on queries and keys where a joint product left them.

Queries, keys and values of one product share one memory: rotating two of them apart would keep the old ones alive for
as long as the values are. Here all are written anew, rotated or as they are, so that the product's memory can go.

T: tokens, H: heads of queries, keys and values together, D: head size.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["tokens"])


def plain_rotary(states: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """`rotary` in plain PyTorch: the definition."""
    first, second = states[:, :turned].to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(states.dtype), states[:, turned:]], dim=1)


def rotary(states: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """The first `turned` heads rotated by their tokens' angles, number j with number j + D / 2; the others as they are.

    Args:
        states: (T, H, D), float16, bfloat16 or float32; computed in float32.
        cos, sin: (T, D / 2) each, of one floating dtype, of the angles of each token; no gradient.
        turned: How many heads are rotated: those of queries and keys.

    Returns:
        As `states`, contiguous.

    Raises:
        ValueError: If shapes or dtypes do not go together.
    """
    tokens, heads, size = states.shape
    if states.dtype == torch.float64 or cos.dtype == torch.float64 or cos.dtype != sin.dtype:
        raise ValueError(f"rotary: {states.dtype} with angles of {cos.dtype} and {sin.dtype}")
    if size % 2 or cos.shape != (tokens, size // 2) or sin.shape != cos.shape or not 0 <= turned <= heads:
        shapes = f"{tuple(states.shape)}, angles {tuple(cos.shape)} and {tuple(sin.shape)}, {turned} heads"
        raise ValueError(f"rotary: {shapes} do not go together")
    out: Tensor = _rotate(states, cos, sin, turned, False)
    return out


@kernel
def rotate(
    states, cos, sin, out, token_stride, head_stride, cos_stride, sin_stride, tokens, turned,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head; by the opposite angles if BACK."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDE)[None, :]
    inside = (token < tokens) & (column < HALF)
    source = states + token * token_stride + head * head_stride + column
    target = out + (token * HEADS + head) * (2 * HALF) + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < turned:
        cosine = tl.load(cos + token * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + token * sin_stride + column, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            sine = -sine
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    tl.store(target, first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "burnish::rotary",
    mutates_args=(),
    schema="(Tensor states, Tensor cos, Tensor sin, int turned, bool back) -> Tensor",
)
def _rotate(states: Tensor, cos: Tensor, sin: Tensor, turned: int, back: bool) -> Tensor:
    """(T, H, D), the first `turned` heads rotated, or rotated back."""
    tokens, heads, size = states.shape
    out = states.new_empty(states.shape)
    if not out.numel():
        return out
    states, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (states, cos, sin))
    wide = triton.next_power_of_2(size // 2)
    rows = max(1, 2048 // wide)
    rotate[(triton.cdiv(tokens, rows), heads)](
        states, cos, sin, out, *states.stride()[:2], cos.stride(0), sin.stride(0), tokens, turned,
        HEADS=heads, HALF=size // 2, BACK=back, ROWS=rows, WIDE=wide,
    )  # fmt: skip
    return out


@_rotate.register_fake
def _(states: Tensor, cos: Tensor, sin: Tensor, turned: int, back: bool) -> Tensor:
    return states.new_empty(states.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.turned, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _rotate(grad, *ctx.saved_tensors, ctx.turned, not ctx.back), None, None, None, None


_rotate.register_autograd(_backward, setup_context=_keep)
