"""`rounded_adamw` in Triton: one launch for all weights of a group, each number read and written once.

A weight in bfloat16 with its gradient and both moments in bfloat16 is 14 bytes of traffic: 335 million of them are 4.7
GB, 1.4 ms at 3.35 TB/s. A launch for each of 390 weights would take several times that long, so the kernel finds
weights through a table of addresses.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from . import adamw
from .dropout import mixed

jit: Callable[[Any], Any] = triton.jit

BLOCK = 1024
FIELDS = 7  # of a weight in the table: four addresses, numbers, first block, key


@jit
def rounded(values, noise):
    """As `adamw.rounded`: `values` are float32, `noise` is uint32 below 2^16."""
    raised = (values.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    finite = tl.abs(values) < float("inf")  # which NaN is not
    return tl.where(finite, raised.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@jit
def stored(values, noise, ROUND: tl.constexpr):
    """What is written of moments: rounded, or as they are."""
    return rounded(values, noise) if ROUND else values


@jit
def step_kernel(
    table, owners, rate, keep, gain1, beta2, gain2, epsilon, correction2,
    GRADIENT: tl.constexpr, MOMENT: tl.constexpr, ROUND: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one weight; `owners` says whose it is."""
    block = tl.program_id(0)
    row = table + tl.load(owners + block).to(tl.int64) * FIELDS
    weight = tl.load(row).to(tl.pointer_type(tl.bfloat16))
    gradient = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
    mean = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    square = tl.load(row + 3).to(tl.pointer_type(MOMENT))
    count, first, key = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    if ALIGNED:  # else the compiler must expect any address and any end, and loads number by number
        weight, gradient = tl.multiple_of(weight, 16), tl.multiple_of(gradient, 16)
        mean, square, count = tl.multiple_of(mean, 16), tl.multiple_of(square, 16), tl.multiple_of(count, 16)
    places = (block - first) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    grad = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    mean_now = tl.load(mean + places, mask=inside, other=0.0).to(tl.float32)
    square_now = tl.load(square + places, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    mean_now += gain1 * (grad - mean_now)
    square_now = square_now * beta2 + gain2 * grad * grad
    value = value * keep - rate * (mean_now / (tl.sqrt(square_now) / correction2 + epsilon))
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = mixed(mixed(places.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
    tl.store(weight + places, rounded(value, bits >> 16), mask=inside)
    tl.store(mean + places, stored(mean_now, bits & 0xFFFF, ROUND), mask=inside)
    tl.store(square + places, stored(square_now, mixed(bits ^ 0x5BD1E995) >> 16, ROUND), mask=inside)


NUMBERS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def rounded_adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    keys: Sequence[int],
    *,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
) -> None:
    """As `adamw.rounded_adamw`, with the same random numbers, for weights on one CUDA device."""
    incoming = [gradient.contiguous() for gradient in gradients]
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[list[int]]] = {}
    for weight, gradient, mean, square, key in zip(weights, incoming, means, squares, keys, strict=True):
        adamw.check(weight, mean, square)
        addresses = [tensor.data_ptr() for tensor in (weight, gradient, mean, square)]
        aligned = all(number % 16 == 0 for number in (*addresses, weight.numel()))
        entry = [*addresses, weight.numel(), 0, _signed(key)]
        groups.setdefault((gradient.dtype, mean.dtype, aligned), []).append(entry)
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    for (kind, moment, aligned), entries in groups.items():
        device = weights[0].device
        owners, firsts = _blocks(tuple(entry[4] for entry in entries), device)
        if not len(owners):
            continue
        for entry, first in zip(entries, firsts, strict=True):
            entry[5] = first
        table = torch.tensor(entries, dtype=torch.int64)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        step_kernel[(len(owners),)](
            table, owners, rate / correction1, 1 - rate * decay, 1 - beta1, beta2, 1 - beta2, epsilon, correction2,
            GRADIENT=NUMBERS[kind], MOMENT=NUMBERS[moment], ROUND=moment == torch.bfloat16, ALIGNED=aligned,
            FIELDS=FIELDS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def _signed(key: int) -> int:
    """64 bits as torch's signed integers hold them."""
    return key - (key >> 63 << 64)


@lru_cache(maxsize=16)
def _blocks(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """(blocks,) int32, the weight that each block is of, and each weight's first block. A model has few such sets."""
    blocks = [triton.cdiv(count, BLOCK) for count in counts]
    owners = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(blocks))
    return owners.to(device), (0, *accumulate(blocks[:-1]))
