"""One vector for each of the texts that stand packed in a row: their mean, first or last token, to unit length or not.

T: tokens of all texts, N: texts, D: features.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["tokens"])

Mode = Literal["mean", "first", "last"]
MODES = ("mean", "first", "last")
LARGEST = 16384
# The smallest length that a vector is divided by, as in torch.nn.functional.normalize.
SHORTEST = 1e-12


def plain_packed_pool(states: Tensor, cu_seqlens: Tensor, mode: Mode, normalize: bool = False) -> Tensor:
    """`packed_pool` in plain PyTorch: the definition."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    wide = states if states.dtype == torch.float64 else states.float()
    if mode == "mean":
        text = torch.repeat_interleave(ends - starts, output_size=states.shape[0])
        sums = wide.new_zeros(len(starts), states.shape[1]).index_add(0, text, wide)
        pooled = sums / (ends - starts).clamp(min=1)[:, None]
    else:
        place = (starts if mode == "first" else ends - 1).clamp(0, max(0, len(states) - 1))
        pooled = wide[place].masked_fill((ends == starts)[:, None], 0.0)
    return (functional.normalize(pooled, dim=1) if normalize else pooled).to(states.dtype)


def packed_pool(states: Tensor, cu_seqlens: Tensor, mode: Mode, normalize: bool = False) -> Tensor:
    """The texts' vectors, added up and measured in float32.

    Args:
        states: (T, D), float16, bfloat16 or float32, D at most 16384.
        cu_seqlens: (N + 1,) integer, the first token of each text and T at the end. An empty text's vector is 0.
        mode: "mean" of a text's tokens, its "first" or its "last".
        normalize: Whether vectors are divided by their length.

    Returns:
        (N, D) in the dtype of `states`.

    Raises:
        ValueError: If the mode, the dtype or D is none of these.
    """
    if mode not in MODES:
        raise ValueError(f"packed_pool: {mode!r} is none of {', '.join(MODES)}")
    if states.dtype == torch.float64 or states.shape[1] > LARGEST:
        raise ValueError(f"packed_pool: {states.dtype} rows of {states.shape[1]} are wider than float32 or {LARGEST}")
    pooled: Tensor = _pool(states, cu_seqlens.int(), MODES.index(mode), normalize)[0]
    return pooled.to(states.dtype)


@kernel
def pool(
    states, bounds, out, lengths, stride, width, shortest,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One text."""
    text = tl.program_id(0)
    start = tl.load(bounds + text)
    end = tl.load(bounds + text + 1)
    column = tl.arange(0, WIDE)
    sums = tl.zeros([WIDE], tl.float32)
    first = start
    last = end
    if MODE == 1:
        last = tl.minimum(end, start + 1)
    if MODE == 2:
        first = tl.maximum(start, end - 1)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < last) & (column < width)[None, :]
        sums += tl.sum(tl.load(states + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    if MODE == 0:
        sums /= tl.maximum(end - start, 1).to(tl.float32)
    if NORMALIZE:
        length = tl.maximum(tl.sqrt(tl.sum(sums * sums, 0)), shortest)
        tl.store(lengths + text, length)
        sums /= length
    tl.store(out + text.to(tl.int64) * width + column, sums, mask=column < width)


@kernel
def pool_gradient(
    grad, pooled, lengths, bounds, grad_states, width, shortest,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of one text's tokens."""
    text = tl.program_id(0)
    start = tl.load(bounds + text)
    end = tl.load(bounds + text + 1)
    column = tl.arange(0, WIDE)
    own = text.to(tl.int64) * width + column
    dout = tl.load(grad + own, mask=column < width, other=0.0)
    if NORMALIZE:
        length = tl.load(lengths + text)
        unit = tl.load(pooled + own, mask=column < width, other=0.0)
        # A vector shorter than the shortest was divided by a constant.
        along = tl.where(length > shortest, tl.sum(dout * unit, 0), 0.0)
        dout = (dout - unit * along) / length
    if MODE == 0:
        dout /= tl.maximum(end - start, 1).to(tl.float32)
    for begin in range(start, end, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        found = tl.broadcast_to(dout[None, :], [ROWS, WIDE])
        if MODE == 1:
            found = tl.where(row == start, found, 0.0)
        if MODE == 2:
            found = tl.where(row == end - 1, found, 0.0)
        inside = (row < end) & (column < width)[None, :]
        tl.store(grad_states + row * width + column[None, :], found.to(grad_states.dtype.element_ty), mask=inside)


def _tile(width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"ROWS": max(1, min(32, 8192 // wide)), "WIDE": wide, "num_warps": 8}


@torch.library.custom_op(
    "burnish::packed_pool",
    mutates_args=(),
    schema="(Tensor states, Tensor bounds, int mode, bool normalize) -> (Tensor, Tensor)",
)
def _pool(states: Tensor, bounds: Tensor, mode: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """(N, D) float32 vectors, and (N,) the lengths that they were divided by (empty if they were not)."""
    states = states if states.stride(1) == 1 else states.contiguous()
    texts, width = bounds.numel() - 1, states.shape[1]
    out = states.new_empty((texts, width), dtype=torch.float32)
    lengths = states.new_empty(texts if normalize else 0, dtype=torch.float32)
    if out.numel():
        pool[(texts,)](
            states, bounds, out, lengths, states.stride(0), width, SHORTEST, MODE=mode, NORMALIZE=normalize,
            **_tile(width),
        )  # fmt: skip
    return out, lengths


@_pool.register_fake
def _(states: Tensor, bounds: Tensor, mode: int, normalize: bool) -> tuple[Tensor, Tensor]:
    texts = bounds.shape[0] - 1
    out = states.new_empty((texts, states.shape[1]), dtype=torch.float32)
    return out, states.new_empty(texts if normalize else 0, dtype=torch.float32)


@torch.library.custom_op(
    "burnish::packed_pool_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor pooled, Tensor lengths, Tensor bounds, SymInt tokens, ScalarType dtype, int mode, "
    "bool normalize) -> Tensor",
)
def _pool_backward(
    grad: Tensor, pooled: Tensor, lengths: Tensor, bounds: Tensor, tokens: int, dtype: torch.dtype, mode: int,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """(T, D) in `dtype`."""
    texts, width = pooled.shape
    found = grad.new_empty((tokens, width), dtype=dtype)
    if found.numel():
        pool_gradient[(texts,)](
            grad.float().contiguous(), pooled, lengths, bounds, found, width, SHORTEST, MODE=mode, NORMALIZE=normalize,
            **_tile(width),
        )  # fmt: skip
    return found


@_pool_backward.register_fake
def _(grad: Tensor, pooled: Tensor, lengths: Tensor, bounds: Tensor, tokens: int, dtype: torch.dtype, mode: int,
      normalize: bool) -> Tensor:  # fmt: skip
    return grad.new_empty((tokens, pooled.shape[1]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, bounds, ctx.mode, ctx.normalize = inputs
    ctx.tokens, ctx.dtype = states.shape[0], states.dtype
    ctx.save_for_backward(*output, bounds)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    found = _pool_backward(grad, *ctx.saved_tensors, ctx.tokens, ctx.dtype, ctx.mode, ctx.normalize)
    return found, None, None, None


_pool.register_autograd(_backward, setup_context=_keep)
