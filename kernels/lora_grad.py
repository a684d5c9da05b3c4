"""Gradients of a LoRA layer's two small matrices, reading the layer's input and its output's gradient once each.

For y = x W^T + s (x A^T) B^T (Hu et al. 2021, equation 3): dB = s dy^T (x A^T), and dA = (s dy B)^T x. As products of
PyTorch these are three passes over tall matrices, dy twice, and each product is a few columns wide and tens of
thousands of rows deep, which general matrix products split badly. Here each reads its tall matrix once, in many parts
by rows, whose float32 sums are then added in a fixed order: nothing is atomic, every run gives the same bits.

T: rows (tokens), I: input features, O: output features, R: rank.
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

kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["rows", "span"])

# Two programs for each multiprocessor of an H100; fixed, so that sums come out the same on every card.
PROGRAMS = 264
# (columns, rows, warps, stages) of a program. `Launch` of the joint pass is for ranks up to the key; above, what it
# writes of dy B's parts, 4 R / columns of what it reads, is as much as reading dy twice.
Launch = tuple[int, int, int, int]
TALL: Launch = (128, 64, 4, 3)
JOINT: dict[int, Launch] = {16: (512, 32, 8, 2), 32: (512, 32, 8, 2)}
SINGLE: Launch = (64, 32, 4, 2)


def plain_tall_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right in float32: (T, R) and (T, N) to (R, N). The definition."""
    return left.float().t() @ right.float()


def plain_lora_gradients(
    inputs: Tensor, grad: Tensor, seen: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_gradients` as products of PyTorch: the definition."""
    back = (grad @ up.to(grad.dtype) * scale).to(grad.dtype)
    return back, plain_tall_product(back, inputs), plain_tall_product(grad, seen) * scale


def tall_product(left: Tensor, right: Tensor, turned: bool = False) -> Tensor:
    """left^T right of two tall matrices, each read once (`right` once for each 64 columns of `left`).

    Args:
        left: (T, R), the narrow one.
        right: (T, N), same dtype: float16, bfloat16 or float32.
        turned: Whether to return (N, R) instead, right^T left.

    Returns:
        (R, N) float32, contiguous.

    Raises:
        ValueError: If shapes or dtypes do not go together.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(f"tall_product: {tuple(left.shape)} {left.dtype} and {tuple(right.shape)} {right.dtype}")
    out: Tensor = _tall_product(left, right, turned)
    return out


def lora_gradients(
    inputs: Tensor, grad: Tensor, seen: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What an adapter's backward needs beside the layer's own product.

    Up to rank 32, dy is read once for both of its products; above, once for each.

    Args:
        inputs: (T, I) x, float16, bfloat16 or float32.
        grad: (T, O) dy, same dtype.
        seen: (T, R) x A^T, same dtype, as the forward had it.
        up: (O, R) B, any floating dtype; multiplied in the dtype of `grad`.
        scale: s.

    Returns:
        (T, R) s dy B in the dtype of `grad`, which times A is the adapter's part of dx; (R, I) dA; (O, R) dB. The last
        two in float32.

    Raises:
        ValueError: If shapes or dtypes do not go together.
    """
    rows, rank = seen.shape
    same = inputs.dtype == grad.dtype == seen.dtype
    if len(inputs) != rows or len(grad) != rows or up.shape != (grad.shape[1], rank) or not same:
        shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (inputs, grad, seen, up))
        raise ValueError(f"lora_gradients: {shapes} do not go together")
    if rank <= max(JOINT) and grad.dtype != torch.float32:
        back, up_grad = _joint_pass(grad, seen, up.to(grad.dtype), scale)
    else:
        back = (grad @ up.to(grad.dtype) * scale).to(grad.dtype)
        up_grad = tall_product(seen, grad, turned=True) * scale
    return back, tall_product(back, inputs), up_grad


@kernel
def tall_tile(
    left, right, parts, left_stride, right_stride, rows, rank, width, span,
    RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part, of `span` rows, of WIDE columns: (parts, rank, width), or (parts, width, rank) if TURNED."""
    columns = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    part = tl.program_id(1)
    few = tl.program_id(2) * RANK + tl.arange(0, RANK)
    found = tl.zeros([WIDE, RANK], tl.float32)
    for begin in range(part * span, tl.minimum(rows, (part + 1) * span), ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = row < rows
        narrow = tl.load(left + row * left_stride + few[None, :], mask=inside & (few < rank)[None, :], other=0.0)
        wide = tl.load(
            right + row * right_stride + columns[None, :], mask=inside & (columns < width)[None, :], other=0.0
        )
        found = tl.dot(tl.trans(wide), narrow, found, input_precision=PRECISION)
    kept = (columns < width)[:, None] & (few < rank)[None, :]
    parts += part.to(tl.int64) * rank * width
    if TURNED:
        tl.store(parts + columns[:, None] * rank + few[None, :], found, mask=kept)
    else:
        tl.store(parts + few[:, None] * width + columns[None, :], tl.trans(found), mask=tl.trans(kept))


@kernel
def joint_tile(
    grad, seen, up, back_parts, up_parts, grad_stride, seen_stride, rows, rank, width, span,
    RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of `span` rows and WIDE columns of dy: their part of dB, and of each row's dy B."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    columns = block * WIDE + tl.arange(0, WIDE)
    few = tl.arange(0, RANK)
    weight_place = columns[:, None] * rank + few[None, :]
    weight_kept = (columns < width)[:, None] & (few < rank)[None, :]
    weight = tl.load(up + weight_place, mask=weight_kept, other=0.0)
    found = tl.zeros([WIDE, RANK], tl.float32)
    for begin in range(part * span, tl.minimum(rows, (part + 1) * span), ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (few < rank)[None, :]
        narrow = tl.load(seen + row * seen_stride + few[None, :], mask=inside, other=0.0)
        wide = tl.load(
            grad + row * grad_stride + columns[None, :], mask=(row < rows) & (columns < width)[None, :], other=0.0
        )
        found = tl.dot(tl.trans(wide), narrow, found)
        back = tl.dot(wide, weight)
        tl.store(back_parts + (block * rows + row) * rank + few[None, :], back, mask=inside)
    tl.store(up_parts + part.to(tl.int64) * rank * width + weight_place, found, mask=weight_kept)


def _parts(rows: int, programs: int, step: int) -> tuple[int, int]:
    """(parts, rows of each, a multiple of `step`) that make about `PROGRAMS` programs of `programs` for each part."""
    parts = max(1, min(PROGRAMS // programs, triton.cdiv(rows, step)))
    span = triton.cdiv(triton.cdiv(rows, parts), step) * step
    return triton.cdiv(rows, span), span


def _side_by_side(matrix: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@torch.library.custom_op(
    "burnish::tall_product", mutates_args=(), schema="(Tensor left, Tensor right, bool turned) -> Tensor"
)
def _tall_product(left: Tensor, right: Tensor, turned: bool) -> Tensor:
    rows, rank = left.shape
    width = right.shape[1]
    shape = (width, rank) if turned else (rank, width)
    if rows == 0:
        return left.new_zeros(shape, dtype=torch.float32)
    left, right = _side_by_side(left), _side_by_side(right)
    wide, step, warps, stages = SINGLE if left.dtype == torch.float32 else TALL
    padded = min(64, max(16, triton.next_power_of_2(rank)))
    grid = triton.cdiv(width, wide), triton.cdiv(rank, padded)
    parts, span = _parts(rows, grid[0] * grid[1], step)
    sums = left.new_empty((parts, *shape), dtype=torch.float32)
    exact = torch.get_float32_matmul_precision() == "highest"
    tall_tile[(grid[0], parts, grid[1])](
        left, right, sums, left.stride(0), right.stride(0), rows, rank, width, span, RANK=padded, WIDE=wide, ROWS=step,
        TURNED=turned, PRECISION="ieee" if exact else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return sums[0] if parts == 1 else sums.sum(0)


@_tall_product.register_fake
def _(left: Tensor, right: Tensor, turned: bool) -> Tensor:
    rank, width = left.shape[1], right.shape[1]
    return left.new_empty((width, rank) if turned else (rank, width), dtype=torch.float32)


@torch.library.custom_op(
    "burnish::lora_joint_pass",
    mutates_args=(),
    schema="(Tensor grad, Tensor seen, Tensor up, float scale) -> (Tensor, Tensor)",
)
def _joint_pass(grad: Tensor, seen: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(T, R) s dy B and (O, R) float32 s dy^T seen, from one pass over dy."""
    rows, width = grad.shape
    rank = seen.shape[1]
    if rows == 0:
        return grad.new_empty(0, rank), grad.new_zeros((width, rank), dtype=torch.float32)
    grad, seen, up = _side_by_side(grad), _side_by_side(seen), up.contiguous()
    padded = max(16, triton.next_power_of_2(rank))
    wide, step, warps, stages = JOINT[padded]
    blocks = triton.cdiv(width, wide)
    parts, span = _parts(rows, blocks, step)
    back = grad.new_empty((blocks, rows, rank), dtype=torch.float32)
    sums = grad.new_empty((parts, width, rank), dtype=torch.float32)
    joint_tile[(blocks, parts)](
        grad, seen, up, back, sums, grad.stride(0), seen.stride(0), rows, rank, width, span, RANK=padded, WIDE=wide,
        ROWS=step, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return (back.sum(0) * scale).to(grad.dtype), sums.sum(0) * scale


@_joint_pass.register_fake
def _(grad: Tensor, seen: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return grad.new_empty(seen.shape), grad.new_empty(up.shape, dtype=torch.float32)
