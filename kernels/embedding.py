"""Look up embeddings, with a gradient that is the same in every run.

PyTorch adds the gradients of one token's places atomically once a model is compiled, in whatever order they come. Here
places are sorted by token, and each token that occurs is added up by one program, in float32 and in the places' order.

T: places (tokens of all texts), V: rows of the table, D: features.
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
from torch.nn import functional

kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["places"])

ROWS, WIDE = 16, 256


def plain_embedding(ids: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """`embedding` in plain PyTorch: the definition."""
    return functional.embedding(ids, weight, padding)


def embedding(ids: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Rows of a table.

    Args:
        ids: (…,) int32 or int64, from 0 to V - 1.
        weight: (V, D), float16, bfloat16 or float32.
        padding: The id whose row gets no gradient.

    Returns:
        (…, D) in the dtype of `weight`.

    Raises:
        ValueError: If the dtype is none of these.
    """
    if weight.dtype == torch.float64:
        raise ValueError("embedding: a table in float64. Use torch.nn.functional.embedding")
    out: Tensor = _look_up(ids.reshape(-1), weight, -1 if padding is None else padding)
    return out.view(*ids.shape, weight.shape[1])


@kernel
def add_up(
    grad, ids, order, out, places, width, padding, ROWS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The places of one token, if `ids`, sorted, begin with it here: ROWS at a time, WIDE features."""
    place = tl.program_id(0)
    token = tl.load(ids + place)
    before = tl.load(ids + place - 1, mask=place > 0, other=-1)
    if (before != token) & (token != padding):
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        sums = tl.zeros([WIDE], tl.float32)
        more = ROWS
        while more == ROWS:
            here = place + tl.arange(0, ROWS)
            own = tl.load(ids + here, mask=here < places, other=-1) == token
            row = tl.load(order + here, mask=own, other=0).to(tl.int64)
            inside = own[:, None] & (column < width)[None, :]
            found = tl.load(grad + row[:, None] * width + column[None, :], mask=inside, other=0.0)
            sums += tl.sum(found.to(tl.float32), 0)
            more = tl.sum(own.to(tl.int32), 0)
            place += ROWS
        target = out + token.to(tl.int64) * width + column
        tl.store(target, sums.to(out.dtype.element_ty), mask=column < width)


@torch.library.custom_op(
    "burnish::embedding", mutates_args=(), schema="(Tensor ids, Tensor weight, SymInt padding) -> Tensor"
)
def _look_up(ids: Tensor, weight: Tensor, padding: int) -> Tensor:
    """(T, D); `padding` -1 is none."""
    return weight.index_select(0, ids)


@_look_up.register_fake
def _(ids: Tensor, weight: Tensor, padding: int) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@torch.library.custom_op(
    "burnish::embedding_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor ids, SymInt rows, SymInt padding, ScalarType dtype) -> Tensor",
)
def _add_up(grad: Tensor, ids: Tensor, rows: int, padding: int, dtype: torch.dtype) -> Tensor:
    """(V, D) in `dtype`."""
    places, width = grad.shape
    out = grad.new_zeros((rows, width), dtype=dtype)
    if grad.numel():
        found, order = torch.sort(ids, stable=True)
        add_up[(places, triton.cdiv(width, WIDE))](
            grad.contiguous(), found, order, out, places, width, padding, ROWS=ROWS, WIDE=WIDE
        )  # fmt: skip
    return out


@_add_up.register_fake
def _(grad: Tensor, ids: Tensor, rows: int, padding: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((rows, grad.shape[1]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, ctx.padding = inputs
    ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    return None, _add_up(grad, *ctx.saved_tensors, ctx.rows, ctx.padding, ctx.dtype), None


_look_up.register_autograd(_backward, setup_context=_keep)
