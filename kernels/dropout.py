"""Which numbers of a matrix dropout keeps (Hinton et al. 2012), from a random number for each row and each column.

A row's 32-bit number plus a column's, mixed, is compared with p 2^32. The numbers come from torch's generator, Philox
on a GPU, as any other operation draws: replays of a CUDA graph get fresh ones, activation checkpointing the same again,
and a backward needs only them, not a mask of the matrix's size.
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

jit: Callable[[Any], Any] = triton.jit


def draw(*shape: int, device: torch.device) -> Tensor:
    """`shape` int32 numbers, all 32 bits random."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def threshold(probability: float) -> int:
    """What `keeps` compares with."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout: a probability of {probability} is not in [0, 1)")
    return round(probability * 2**32)


@jit
def numbers_of(base, places, end):
    """The numbers of some rows or columns; 0 past the `end`."""
    return tl.load(base + places, mask=places < end, other=0).to(tl.uint32, bitcast=True)


@jit
def keeps(row, column, THRESHOLD: tl.constexpr):
    """Whether to keep each number of a tile; `row` and `column` broadcast to its shape.

    Mixing takes 8 integer operations a number; Philox itself takes about 80 for four numbers, which lie elsewhere than
    a tile's do. The sums are uniform and independent in pairs; two products (Wellons's constants for 32-bit mixing)
    break what ties the four corners of a rectangle.
    """
    mixed = row + column
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return (mixed ^ (mixed >> 16)) >= THRESHOLD
