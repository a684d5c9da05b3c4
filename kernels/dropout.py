"""Which numbers of a matrix dropout keeps (Hinton et al. 2012), from two random numbers for each row and one for each
column.

A number's hash is a x + b modulo 2^32, with a and b its row's and x its column's (Carter and Wegman 1979), and is
compared with p 2^32: one multiply-add a number, where Philox takes about 20. The numbers come from torch's generator,
Philox on a GPU, as any other operation draws: replays of a CUDA graph get fresh ones, activation checkpointing the same
again, and a backward needs only them, not a mask of the matrix's size.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

jit: Callable[[Any], Any] = triton.jit


@jit
def numbers_of(base, places, end):
    """The numbers of some rows or columns; 0 past the `end`."""
    return tl.load(base + places, mask=places < end, other=0).to(tl.uint32, bitcast=True)


@jit
def columns_of(seed, places):
    """A number for each column, made of one random number: loads in a loop of products would stop their pipeline."""
    mixed = (places.to(tl.uint32) * 0x9E3779B1 ^ seed) * 0x85EBCA6B
    return mixed ^ (mixed >> 15)


@jit
def keeps(slope, shift, column, THRESHOLD: tl.constexpr):
    """Whether to keep each number of a tile; slopes and shifts of rows and numbers of columns broadcast to its shape.

    Each hash is uniform, and so is the difference of two in a row, a (x - y), where x - y is odd, and nearly elsewhere.
    A slope of its own for each row is what keeps rows apart: sums of one number a row and one a column would tie the
    four corners of every rectangle.
    """
    return slope * column + shift >= THRESHOLD


@jit
def mixed(value):
    """Murmur's finaliser of unsigned numbers."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@jit
def spread_kernel(out, seed, salt, count, BLOCK: tl.constexpr):
    """The numbers of one block of indices."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(seed).to(tl.uint32, bitcast=True)
    second = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    value = index.to(tl.uint32) * 0x9E3779B9 + salt.to(tl.uint32, bitcast=True) + first
    value = mixed(mixed(value) + second)
    tl.store(out + index, value.to(tl.int32, bitcast=True), mask=index < count)


def spread(seed: Tensor, count: int, salt: int) -> Tensor:
    """`light_dropout.spread` as one kernel; `salt` is what it makes of `place`."""
    out = seed.new_empty(count)
    if count:
        spread_kernel[(triton.cdiv(count, 1024),)](out, seed, salt, count, BLOCK=1024)
    return out
