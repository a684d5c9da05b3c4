"""AdamW for weights held in bfloat16, rounded stochastically: the plain version, on any device.

At a learning rate of 2e-5 a step moves a weight of 0.05 by about 2e-5, and the next bfloat16 is 2.4e-4 away: rounded to
the nearest, every such step is lost. Rounded up with the probability of the distance, the weight is right on average
(Gupta et al. 2015, section 3; Zamirai et al. 2020). All arithmetic is float32; only what is stored is rounded, moments
in bfloat16 as well, whose decay of 1 in 1,000 the nearest would lose in the same way.

The random numbers are a hash of a key and of the place, so that there is no generator to save, nothing else draws other
numbers for it, and processes that hold the same weights round them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .light_dropout import mixed

CPU_CHUNK = 2**16  # float32 numbers at a time: what a chunk needs stays in a core's cache
CHUNK = 2**24


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
    """A step of AdamW (Loshchilov and Hutter 2019, algorithm 2) in place, as `torch.optim.AdamW` counts, in float32.

    Every implementation takes the random numbers of `random_bits`: the upper half of a place's bits for the weight, the
    lower for the first moment, the upper half of another hash of them for the second.

    Args:
        weights: bfloat16, contiguous, any shape. Rounded stochastically.
        gradients: One for each weight, of its shape, floating.
        means: First moments, contiguous, float32 or bfloat16. bfloat16 is rounded stochastically.
        squares: Second moments, as `means`.
        keys: For each weight a number below 2^64 that its random numbers depend on; another in every step.
        step: Steps with this one, from 1, for the correction of the bias.
        rate: The learning rate.
        beta1: Decay of the first moments.
        beta2: Decay of the second moments.
        epsilon: Added to the denominator.
        decay: Weight decay; the learning rate multiplies it.

    Returns:
        Nothing: weights and moments are changed in place.

    Raises:
        ValueError: If a weight is not bfloat16, or a weight or moment is not contiguous.
    """
    numbers = (rate, 1 - rate * decay, beta1, beta2, epsilon, 1 - beta1**step, math.sqrt(1 - beta2**step))
    for weight, gradient, mean, square, key in zip(weights, gradients, means, squares, keys, strict=True):
        check(weight, mean, square)
        size = CPU_CHUNK if weight.device.type == "cpu" else CHUNK
        flat = [tensor.view(-1) for tensor in (weight, mean, square)]
        incoming = gradient.reshape(-1)
        for start in range(0, weight.numel(), size):
            part = slice(start, start + size)
            bits = random_bits(key, start, incoming[part].numel(), weight.device)
            _step(flat[0][part], flat[1][part], flat[2][part], incoming[part].float(), bits, *numbers)


def check(weight: Tensor, mean: Tensor, square: Tensor) -> None:
    """Refuse what the step would compute wrongly.

    Raises:
        ValueError: See `rounded_adamw`.
    """
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"rounded_adamw: a weight is {weight.dtype}, not torch.bfloat16")
    if not (weight.is_contiguous() and mean.is_contiguous() and square.is_contiguous()):
        raise ValueError("rounded_adamw: a weight or moment is not contiguous")


def _step(
    weight: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, bits: Tensor,
    rate: float, keep: float, beta1: float, beta2: float, epsilon: float, correction1: float, correction2: float,
) -> None:  # fmt: skip
    """A chunk of one weight, all (n,), with (n,) int32 random `bits`."""
    first = mean.float().lerp_(gradient, 1 - beta1)
    second = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    moved = weight.float().mul_(keep)
    moved.addcdiv_(first, (second.sqrt() / correction2).add_(epsilon), value=-rate / correction1)
    weight.copy_(rounded(moved, _upper(bits)))
    if mean.dtype == torch.bfloat16:
        mean.copy_(rounded(first, bits & 0xFFFF))
    elif mean.data_ptr() != first.data_ptr():
        mean.copy_(first)
    if square.dtype == torch.bfloat16:
        square.copy_(rounded(second, _upper(mixed(bits ^ 0x5BD1E995))))
    elif square.data_ptr() != second.data_ptr():
        square.copy_(second)


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """float32 `values` as bfloat16, up or down in magnitude: up where `noise` and the 16 bits that go overflow.

    Args:
        values: float32. What is not finite stays what it is.
        noise: int32, uniform in [0, 2^16). With it the result is right on average.
    """
    cut = (values.view(torch.int32) + noise) & -0x10000
    return torch.where(values.isfinite(), cut.view(torch.float32), values).bfloat16()


def random_bits(key: int, start: int, count: int, device: Any) -> Tensor:
    """(count,) int32, all 32 bits a hash of `key` and of the places from `start` on."""
    low, high = signed(key), signed(key >> 32)
    places = torch.arange(start, start + count, device=device).to(torch.int32)
    return mixed(mixed(places * signed(0x9E3779B1) + low) ^ high)


def signed(number: int) -> int:
    """The lowest 32 bits as a signed number: products of int32 wrap around, as those of uint32 do."""
    return (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)


def _upper(bits: Tensor) -> Tensor:
    return (bits >> 16) & 0xFFFF
