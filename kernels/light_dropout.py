"""Dropout without a mask of its own, for layers that a compiler fuses.

torch's dropout keeps one byte a number for the backward, which no compiler makes again, since it would draw other
numbers. Here the mask is a hash of two random numbers a row and one a column (`dropout.keeps`), cheap to compute again:
two of them in a layer of 1,024 features spare 64 MiB for 32,768 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


# Opaque, so that numbers are drawn once and stored: a compiler would draw them in every place that reads them.
@torch.library.custom_op("burnish::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: Tensor, count: int) -> Tensor:
    """`count` int32 numbers, all 32 bits random, where `like` is."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=like.device)


@draw.register_fake
def _(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.int32)


def threshold(probability: float) -> int:
    """What a number's hash, uniform below 2^32, is compared with."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout: a probability of {probability} is not in [0, 1)")
    return round(probability * 2**32)


def light_dropout(states: Tensor, probability: float) -> Tensor:
    """`torch.nn.functional.dropout` with `probability` in [0, 1), by hashes: (…, D) to (…, D), same dtype."""
    width = states.shape[-1]
    rows = states.numel() // width
    numbers = draw(states, 2 * rows + width)
    slope, shift = numbers[: 2 * rows].view(2, *states.shape[:-1], 1).unbind()
    # Products wrap around at 32 bits; compared as signed numbers, so the threshold begins at the least of them.
    kept = slope * numbers[2 * rows :] + shift >= threshold(probability) - 2**31
    return torch.where(kept, states * (1 / (1 - probability)), 0.0)


class LightDropout(nn.Dropout):
    """`nn.Dropout` by `light_dropout`: a module has this class for the length of a step, its own before and after."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        if not self.training or not 0.0 < self.p < 1.0 or not input.is_cuda:
            return super().forward(input)
        return light_dropout(input, self.p)
