"""Dropout, the residual sum and a norm in one pass: what stands between two products of a transformer layer.

    total = residual + dropout(states);  out = norm(total)

Layer norm (Ba et al. 2016, equation 4) or RMS norm (Zhang and Sennrich 2019, equation 4), in float32 inside. Kept for
the backward: `total`, in the input's dtype, two numbers a row, two random numbers for each row and one for each column.

T: rows (tokens), D: features.
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

from .dropout import draw, keeps, numbers_of, threshold

kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["rows", "span"])

LARGEST = 16384
# Parts of the weights' gradients: two programs for each multiprocessor of an H100, fixed, so that sums come out the
# same on every card.
PARTS = 264


def plain_add_norm(
    states: Tensor, weight: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None, *,
    eps: float, dropout: float = 0.0, centred: bool = True, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`add_norm` in plain PyTorch: the definition."""
    total = functional.dropout(states, dropout) if dropout else states
    total = total if residual is None else total + residual
    wide = total.float() if total.dtype != torch.float64 else total
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (offset + weight.to(out.dtype))
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(states.dtype), total


def add_norm(
    states: Tensor, weight: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None, *,
    eps: float, dropout: float = 0.0, centred: bool = True, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dropout, residual sum and norm over the last dimension.

    Args:
        states: (…, D), any floating dtype up to float32, D at most 16384.
        weight: (D,), or None for 1.
        bias: (D,), or None.
        residual: As `states`, same dtype, or None.
        eps: Added to the variance.
        dropout: Probability with which a number of `states` is dropped, below 1.
        centred: Whether the mean is taken off (layer norm) or not (RMS norm).
        offset: Added to the weight: 1 for Gemma's, which are stored less 1.

    Returns:
        The norm and the sum it was made of, both as `states`. Without dropout and residual the second is `states`.

    Raises:
        ValueError: If a shape, a dtype or the probability is none of these.
    """
    width = states.shape[-1]
    if states.dtype == torch.float64 or width > LARGEST:
        raise ValueError(f"add_norm: {states.dtype} rows of {width} are wider than float32 or {LARGEST}")
    if residual is not None and (residual.shape != states.shape or residual.dtype != states.dtype):
        raise ValueError(f"add_norm: residual {tuple(residual.shape)} {residual.dtype} is not as the states")
    if any(each is not None and each.shape != (width,) for each in (weight, bias)):
        raise ValueError(f"add_norm: weight and bias are not ({width},)")
    rows = states.reshape(-1, width)
    drawn = None
    if threshold(dropout) > 0:
        drawn = draw(2 * rows.shape[0] + width, device=states.device)
    beside = None if residual is None else residual.reshape(-1, width)
    out, total, _, _ = _add_norm(rows, weight, bias, beside, drawn, eps, dropout, centred, offset)
    plain = residual is None and drawn is None
    return out.view(states.shape), states if plain else total.view(states.shape)


@kernel
def norm_rows(
    states, weight, bias, residual, drawn, out, total, means, scales, rows, width, eps, offset, inflation,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, THRESHOLD: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    found = tl.load(states + place, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        slope, shift = numbers_of(drawn, row, rows), numbers_of(drawn + rows, row, rows)
        kept = keeps(slope[:, None], shift[:, None], numbers_of(drawn + 2 * rows, column, width)[None, :], THRESHOLD)
        found = tl.where(kept, found * inflation, 0.0)
    if ADDED:
        found += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if ADDED or THRESHOLD > 0:
        rounded = found.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        found = rounded.to(tl.float32)  # as the backward will read it
    if CENTRED:
        mean = tl.sum(found, 1) / width
        tl.store(means + row, mean, mask=row < rows)
        found = tl.where(inside, found - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(found * found, 1) / width + eps)
    tl.store(scales + row, scale, mask=row < rows)
    found *= scale[:, None]
    if WEIGHTED:
        found *= (offset + tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32))[None, :]
    if BIASED:
        found += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)


@kernel
def norm_gradient(
    grad, grad_total, weight, drawn, total, means, scales, grad_states, grad_residual, weight_parts, bias_parts,
    rows, width, span, offset, inflation,
    WEIGHTED: tl.constexpr, SUMMED: tl.constexpr, PASSED: tl.constexpr, THRESHOLD: tl.constexpr,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`span` rows, ROWS at a time: gradients of states and residual, and this part's of weight and bias."""
    part = tl.program_id(0)
    column = tl.arange(0, WIDE)
    factor = tl.full([WIDE], 1.0, tl.float32)
    if WEIGHTED:
        factor = offset + tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([WIDE], tl.float32)
    bias_sum = tl.zeros([WIDE], tl.float32)
    for begin in range(part * span, tl.minimum(rows, (part + 1) * span), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        dout = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            normal -= tl.load(means + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.where(inside, normal * scale, 0.0)
        if SUMMED:
            weight_sum += tl.sum(dout * normal, 0)
            bias_sum += tl.sum(dout, 0)
        dout *= factor[None, :]
        found = dout - normal * (tl.sum(dout * normal, 1) / width)[:, None]
        if CENTRED:
            found -= (tl.sum(dout, 1) / width)[:, None]
        found *= scale
        if PASSED:
            found += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            tl.store(grad_residual + place, found.to(grad_residual.dtype.element_ty), mask=inside)
            slope, shift = numbers_of(drawn, row, rows), numbers_of(drawn + rows, row, rows)
            columns = numbers_of(drawn + 2 * rows, column, width)
            kept = keeps(slope[:, None], shift[:, None], columns[None, :], THRESHOLD)
            found = tl.where(kept, found * inflation, 0.0)
        tl.store(grad_states + place, found.to(grad_states.dtype.element_ty), mask=inside)
    if SUMMED:
        place = part * width + column
        tl.store(weight_parts + place, weight_sum, mask=column < width)
        tl.store(bias_parts + place, bias_sum, mask=column < width)


def _tile(width: int) -> dict[str, int]:
    """About 4096 numbers a program, whole rows."""
    wide = triton.next_power_of_2(width)
    return {"ROWS": max(1, 2048 // wide), "WIDE": wide, "num_warps": 4 if wide <= 2048 else 8 if wide <= 8192 else 16}


@torch.library.custom_op(
    "burnish::add_norm",
    mutates_args=(),
    schema="(Tensor states, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? drawn, float eps, float dropout, "
    "bool centred, float offset) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm(
    states: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, drawn: Tensor | None,
    eps: float, dropout: float, centred: bool, offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(T, D) norm and sum (empty where that is `states`); (T,) means (empty unless centred) and 1 / deviations."""
    rows, width = states.shape
    states = states.contiguous()
    out = torch.empty_like(states)
    total = torch.empty_like(states) if residual is not None or drawn is not None else states.new_empty(0)
    means, scales = (states.new_empty(size, dtype=torch.float32) for size in (rows if centred else 0, rows))
    if rows == 0:
        return out, total, means, scales
    tile = _tile(width)
    beside = states if residual is None else residual.contiguous()
    norm_rows[(triton.cdiv(rows, tile["ROWS"]),)](
        states, states if weight is None else weight, states if bias is None else bias, beside,
        states if drawn is None else drawn, out, total, means, scales, rows, width, eps, offset, 1 / (1 - dropout),
        WEIGHTED=weight is not None, BIASED=bias is not None, ADDED=residual is not None,
        THRESHOLD=threshold(dropout), CENTRED=centred, **tile,
    )  # fmt: skip
    return out, total, means, scales


@_add_norm.register_fake
def _(states: Tensor, weight: Any, bias: Any, residual: Any, drawn: Any, eps: float, dropout: float, centred: bool,
      offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = states.shape[0]
    made = residual is not None or drawn is not None
    return (
        states.new_empty(states.shape),
        states.new_empty(states.shape if made else (0,)),
        states.new_empty(rows if centred else 0, dtype=torch.float32),
        states.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op(
    "burnish::add_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor? weight, Tensor? drawn, Tensor total, Tensor means, "
    "Tensor scales, float dropout, bool centred, float offset, bool sums) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm_backward(
    grad: Tensor, grad_total: Tensor | None, weight: Tensor | None, drawn: Tensor | None, total: Tensor, means: Tensor,
    scales: Tensor, dropout: float, centred: bool, offset: float, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of states, of the residual (empty without dropout: the same), and in float32 of weight and bias."""
    rows, width = total.shape
    grad, total = grad.contiguous(), total.contiguous()
    found = torch.empty_like(total)
    beside = torch.empty_like(total) if drawn is not None else total.new_empty(0)
    tile = _tile(width)
    span = triton.cdiv(triton.cdiv(rows, PARTS), tile["ROWS"]) * tile["ROWS"]
    parts = triton.cdiv(rows, span) if rows else 0
    partial = scales.new_empty(2, parts if sums else 0, width)
    if rows:
        norm_gradient[(parts,)](
            grad, grad if grad_total is None else grad_total.contiguous(), grad if weight is None else weight,
            grad if drawn is None else drawn, total, means, scales, found, beside, partial[0], partial[1],
            rows, width, span, offset, 1 / (1 - dropout), WEIGHTED=weight is not None, SUMMED=sums,
            PASSED=grad_total is not None, THRESHOLD=threshold(dropout), CENTRED=centred, **tile,
        )  # fmt: skip
    weight_grad, bias_grad = partial.sum(1)
    return found, beside, weight_grad, bias_grad.clone()


@_add_norm_backward.register_fake
def _(grad: Tensor, grad_total: Any, weight: Any, drawn: Any, total: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    beside = total.new_empty(total.shape if drawn is not None else (0,))
    sums = [total.new_empty(total.shape[1], dtype=torch.float32) for _ in range(2)]
    return total.new_empty(total.shape), beside, *sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, weight, bias, residual, drawn, _, *ctx.options = inputs
    _, total, means, scales = output
    ctx.made = residual is not None or drawn is not None
    ctx.save_for_backward(weight, bias, drawn, total if ctx.made else states, means, scales)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    weight, bias, drawn, total, means, scales = ctx.saved_tensors
    wants = ctx.needs_input_grad
    sums = wants[1] or wants[2]
    found, beside, weight_grad, bias_grad = _add_norm_backward(
        torch.zeros_like(total) if grad is None else grad, grad_total if ctx.made else None, weight, drawn, total,
        means, scales, *ctx.options, sums,
    )  # fmt: skip
    return (
        found,
        weight_grad.to(weight.dtype) if wants[1] else None,
        bias_grad.to(bias.dtype) if wants[2] else None,
        (found if drawn is None else beside) if wants[3] else None,
        *(None,) * 5,
    )


_add_norm.register_autograd(_backward, setup_context=_keep)
