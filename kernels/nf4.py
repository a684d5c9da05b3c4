"""Frozen weights that bitsandbytes holds in 4 or 8 bits, made into 16-bit ones together with their LoRA update.

A QLoRA layer computes x (W + s B A)^T (Dettmers et al. 2023, equation 5) with W in NF4: 4 bits a number, an index into
a table of 16; a scale for each block of 64, itself in 8 bits with a scale for each 256 (double quantisation). Here one
kernel reads the bits, adds s B A in float32 and rounds the sum once, so that the rest of the layer is a plain product.
It is made again in the backward: what is kept for it are the bits. The Triton part is in `nf4_tiles`.

O, I: output and input features of a layer, R: its adapter's rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from . import nf4_tiles
except ImportError:  # Triton has no wheels for this system
    nf4_tiles = None  # type: ignore[assignment]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TENSORS = 6
"""How many of a `Stored`'s fields are tensors."""


class Stored(NamedTuple):
    """A frozen (O, I) weight in few bits, as plain tensors.

    Args:
        data: NF4: (O I / 2,) uint8, two numbers a byte, the first in the upper half. 8 bits: (O I,) int8.
        scales: NF4: (blocks,) uint8 where they are quantised themselves, else float32. 8 bits: (O,) float32, the
            largest number of each row, which 127 stands for (Dettmers et al. 2022, section 2.1).
        table: (16,) float32, what 4 bits stand for. 8 bits: empty, as all that follow.
        coarse_table: (256,) float32, what a quantised scale stands for; empty where scales are float32.
        coarse: (blocks / coarse_block,) float32, the scale of each group of scales.
        offset: (1,) float32, added to every scale.
        rows, columns: O and I.
        block, coarse_block: Numbers that share a scale, scales that share a coarse one.
    """

    data: Tensor
    scales: Tensor
    table: Tensor
    coarse_table: Tensor
    coarse: Tensor
    offset: Tensor
    rows: int
    columns: int
    block: int = 64
    coarse_block: int = 256

    @property
    def eight(self) -> bool:
        """Whether it is in 8 bits."""
        return self.data.dtype == torch.int8

    @property
    def nested(self) -> bool:
        """Whether its scales are quantised too."""
        return self.scales.dtype == torch.uint8


def stored(layer: Any) -> Stored | None:
    """The weight of a linear layer of bitsandbytes that holds it in NF4 or 8 bits; None for any other layer."""
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        return _four(weight, state, layer.in_features) if state.quant_type == "nf4" else None
    held: Any = getattr(layer, "state", None)
    # bitsandbytes moves both from the weight to the layer's state in the first call.
    codes = getattr(weight, "CB", None) if getattr(held, "CB", None) is None else held.CB
    scales = getattr(weight, "SCB", None) if getattr(held, "SCB", None) is None else held.SCB
    if codes is None or scales is None or codes.dtype != torch.int8:
        return None
    none = scales.new_empty(0)
    return Stored(_plain(codes).flatten(), scales, none, none, none, none, *codes.shape)


def _four(weight: Tensor, state: Any, columns: int) -> Stored:
    data = _plain(weight)
    data = (data if data.dtype == torch.uint8 else data.contiguous().view(torch.uint8)).flatten()
    none = state.absmax.new_empty(0, dtype=torch.float32)
    nested = (none, none, none)
    if state.nested:
        nested = (state.state2.code, state.state2.absmax, state.offset.reshape(1))
    coarse = state.state2.blocksize if state.nested else 256
    rows = state.shape[0]
    return Stored(data, state.absmax, state.code, *nested, rows, columns, state.blocksize, coarse)


def _plain(value: Tensor) -> Tensor:
    """The same memory as a tensor of torch's own class: subclasses answer torch's functions themselves."""
    plain: Tensor = value.detach().as_subclass(Tensor)
    return plain


def dense(weight: Stored) -> Tensor:
    """(O, I) float32: the numbers that the bits stand for. What bitsandbytes computes, bit for bit, before it rounds
    them to another dtype; the plain version."""
    if weight.eight:
        numbers = weight.data.view(weight.rows, weight.columns).float()
        return numbers * weight.scales[:, None] * 0.007874015748031496
    pairs = weight.data.int()
    halves = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.rows * weight.columns]
    scales = weight.scales
    if weight.nested:
        coarse = weight.coarse.repeat_interleave(weight.coarse_block)[: len(scales)]
        scales = weight.coarse_table[scales.int()] * coarse + weight.offset
    spread = scales.repeat_interleave(weight.block)[: len(halves)]
    return (weight.table[halves] * spread).view(weight.rows, weight.columns)


def write(
    out: Tensor, weight: Stored, down: Tensor | None = None, up: Tensor | None = None, scale: float = 1.0
) -> None:
    """Write W + s B A, added in float32 and rounded once to the nearest, into `out`.

    Args:
        out: (O, I), any floating dtype, numbers of a row side by side.
        weight: W.
        down, up, scale: A (R, I), B (O, R) and s; None for W alone.
    """
    if nf4_tiles is not None and (out.is_cuda or INTERPRETED):
        nf4_tiles.write(out, weight, down, up, scale)
        return
    made = dense(weight)
    if down is not None and up is not None:
        made = torch.addmm(made, up.float(), down.float(), alpha=scale)
    out.copy_(made)


def effective_weight(
    weight: Stored, down: Tensor | None, up: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """(O, I): W + s B A in `dtype`.

    Rounded to the nearest, with no dither as a 16-bit base needs it (`lora.effective_weight`): numbers of NF4 do not
    lie on a 16-bit dtype's grid, where every update below half a step would be lost, but anywhere between its points.
    """
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.data.device)
    write(out, weight, down, up, scale)
    return out


# Opaque to a compiler, which would keep the result for the backward.
@torch.library.custom_op("burnish::stored_rows", mutates_args=())
def stored_rows(
    tensors: list[Tensor], sizes: list[int], downs: list[Tensor], ups: list[Tensor], scales: list[float], spare: int,
    like: Tensor,
) -> Tensor:  # fmt: skip
    """The matrix of a forward product: effective weights of several layers above each other, then each A, then zeros.

    Args:
        tensors, sizes: The fields of each layer's `Stored`, one layer after the other.
        downs, ups, scales: A, B and s of each.
        spare: Rows of zeros.
        like: Any tensor of the dtype that is wanted.

    Returns:
        (sum of O + sum of R + spare, I).
    """
    weights = unflatten(tensors, sizes)
    out = like.new_empty(_height(weights) + sum(map(len, downs)) + spare, weights[0].columns)
    first = 0
    for weight, down, up, scale in zip(weights, downs, ups, scales, strict=True):
        write(out[first : first + weight.rows], weight, down, up, scale)
        first += weight.rows
    for down in downs:
        out[first : first + len(down)] = down
        first += len(down)
    out[first:] = 0
    return out


@stored_rows.register_fake
def _(
    tensors: list[Tensor], sizes: list[int], downs: list[Tensor], ups: list[Tensor], scales: list[float], spare: int,
    like: Tensor,
) -> Tensor:  # fmt: skip
    height = sum(up.shape[0] for up in ups) + sum(down.shape[0] for down in downs) + spare
    return like.new_empty(height, downs[0].shape[1])


@torch.library.custom_op("burnish::stored_columns", mutates_args=())
def stored_columns(
    tensors: list[Tensor], sizes: list[int], downs: list[Tensor], ups: list[Tensor], scales: list[float], spare: int,
    grad: Tensor,
) -> Tensor:  # fmt: skip
    """The matrix of the backward's product: effective weights above each other, beside them each s B in columns of its
    own, then zeros.

    `grad` gives its dtype, and the promise that it is not made before the backward: nothing else depends on that.

    Returns:
        (sum of O, I + sum of R + spare).
    """
    weights = unflatten(tensors, sizes)
    columns = weights[0].columns
    out = grad.new_empty(_height(weights), columns + sum(map(len, downs)) + spare)
    out[:, columns:] = 0
    first, beside = 0, columns
    for weight, down, up, scale in zip(weights, downs, ups, scales, strict=True):
        part = out[first : first + weight.rows]
        write(part[:, :columns], weight, down, up, scale)
        part[:, beside : beside + len(down)] = up * scale
        first, beside = first + weight.rows, beside + len(down)
    return out


@stored_columns.register_fake
def _(
    tensors: list[Tensor], sizes: list[int], downs: list[Tensor], ups: list[Tensor], scales: list[float], spare: int,
    grad: Tensor,
) -> Tensor:  # fmt: skip
    width = downs[0].shape[1] + sum(down.shape[0] for down in downs) + spare
    return grad.new_empty(sum(up.shape[0] for up in ups), width)


def _height(weights: Sequence[Stored]) -> int:
    return sum(weight.rows for weight in weights)


def flatten(weights: Sequence[Stored]) -> tuple[list[Tensor], list[int]]:
    """Tensors and sizes of several, for an operation that takes no tuples."""
    tensors: list[Tensor] = []
    sizes: list[int] = []
    for weight in weights:
        tensors += [weight.data, weight.scales, weight.table, weight.coarse_table, weight.coarse, weight.offset]
        sizes += [weight.rows, weight.columns, weight.block, weight.coarse_block]
    return tensors, sizes


def unflatten(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Stored]:
    """What `flatten` took apart."""
    found = []
    for place in range(len(sizes) // 4):
        data, scales, table, coarse_table, coarse, offset = tensors[TENSORS * place : TENSORS * (place + 1)]
        found.append(Stored(data, scales, table, coarse_table, coarse, offset, *sizes[4 * place : 4 * (place + 1)]))
    return found
