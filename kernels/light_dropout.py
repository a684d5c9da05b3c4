"""Dropout without a mask of its own, for layers that a compiler fuses.

torch's dropout keeps one byte a number for the backward, which no compiler makes again, since it would draw other
numbers. Here the mask is a hash of two random numbers a row and one a column (`dropout.keeps`), cheap to compute again:
two of them in a layer of 1,024 features spare 64 MiB for 32,768 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Opaque, so that a compiler does not draw in every place that reads the numbers. In a compiled layer it may still be
# called in forward and backward, hence seeds.
@torch.library.custom_op("burnish::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: Tensor, count: int) -> Tensor:
    """`count` int32 numbers, all 32 bits random, where `like` is."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=like.device)


@draw.register_fake
def _(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.int32)


@dataclass(slots=True)
class Source:
    """Where numbers come from.

    Args:
        seed: (2,) int32 that all numbers are made of, or None: they are drawn from torch's generator.
        again: Whether the whole layer is computed a second time, in the backward.
    """

    seed: Tensor | None = None
    again: bool = False


SOURCE = Source()
"""A compiled layer is given a seed, drawn outside of it: whatever of it is computed again in the backward, by a user's
wish or by the compiler's, drops again what it dropped before. torch's partitioner takes an operator that it does not
know for free, and calls it again where not all activations are kept, though it draws (torch 2.11 to 2.13): classifiers
of MiniLM came to 0.20, 0.81 and 0.84 in place of 0.87 (H100, results/rerank-quality-2026-11-26-h100.jsonl)."""


@contextmanager
def seeded(like: Tensor, *, again: bool = True) -> Iterator[None]:
    """All numbers of a block from one seed, which is drawn where `like` is; `again` as in `Source`."""
    before = SOURCE.seed, SOURCE.again
    SOURCE.seed, SOURCE.again = draw(like, 2), again
    try:
        yield
    finally:
        SOURCE.seed, SOURCE.again = before


def numbers(like: Tensor, count: int, place: int) -> Tensor:
    """`count` int32 numbers, all 32 bits random, where `like` is; `place` tells those of one seed apart."""
    seed = SOURCE.seed
    made: Tensor = draw(like, count) if seed is None else spread(seed, count, place)
    return made


# Opaque for the same reason as `draw`, but it may be called again: its numbers depend on nothing but its arguments.
@torch.library.custom_op("burnish::spread", mutates_args=())
def spread(seed: Tensor, count: int, place: int) -> Tensor:
    """(count,) int32 out of a (2,) int32 `seed`: of each number's index two rounds of Murmur's finaliser (Appleby
    2011), a half of the seed with each."""
    salt = (place * 1013904223 + 2**31) % 2**32 - 2**31
    if seed.is_cuda or INTERPRETED:
        from .dropout import spread as on_device

        return on_device(seed, count, salt)
    made = torch.arange(count, dtype=torch.int32) * -1640531527 + salt + seed[0]
    return mixed(mixed(made) + seed[1])


def mixed(value: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of int32 `value`: MurmurHash3's finaliser (Appleby 2011). Products
    wrap around at 32 bits, shifts to the right fill with zeros."""
    value = (value ^ ((value >> 16) & 0xFFFF)) * -2048144789
    value = (value ^ ((value >> 13) & 0x7FFFF)) * -1028477387
    return value ^ ((value >> 16) & 0xFFFF)


@spread.register_fake
def _(seed: Tensor, count: int, place: int) -> Tensor:
    return seed.new_empty(count)


def threshold(probability: float) -> int:
    """What a number's hash, uniform below 2^32, is compared with."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout: a probability of {probability} is not in [0, 1)")
    return round(probability * 2**32)


def light_dropout(states: Tensor, probability: float, place: int = 1) -> Tensor:
    """`torch.nn.functional.dropout` with `probability` in [0, 1), by hashes: (…, D) to (…, D), same dtype.

    `place` tells several of them under one seed apart; 0 is attention's.
    """
    width = states.shape[-1]
    rows = states.numel() // width
    made = numbers(states, 2 * rows + width, place)
    slope, shift = made[: 2 * rows].view(2, *states.shape[:-1], 1).unbind()
    # Products wrap around at 32 bits; compared as signed numbers, so the threshold begins at the least of them.
    kept = slope * made[2 * rows :] + shift >= threshold(probability) - 2**31
    return torch.where(kept, states * (1 / (1 - probability)), 0.0)


class LightDropout(nn.Dropout):
    """`nn.Dropout` by `light_dropout`: a module has this class for the length of a step, its own before and after.

    On a CPU it is torch's own, but under a seed.
    """

    place = 1
    """Which of its layer's it is."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        if not self.training or not 0.0 < self.p < 1.0 or not (input.is_cuda or SOURCE.seed is not None):
            return super().forward(input)
        return light_dropout(input, self.p, self.place)
