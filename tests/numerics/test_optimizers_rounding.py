"""Stochastic rounding: right on average, to a neighbour, reproducible; and AdamW's arithmetic in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.core.optimizers import Rounding
from burnish.kernels.adamw import CPU_CHUNK, random_bits, rounded, rounded_adamw

NUMBERS: dict[str, Any] = {"rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "decay": 0.1}


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 below and above in magnitude, as float32; the same twice where a value is one."""
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((values.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return below, above


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    """4,096 draws of 64 values: the mean is within five standard errors, where the nearest is up to 100 away."""
    torch.manual_seed(0)
    values = torch.randn(64) * 0.05
    draws = 4096
    bits = random_bits(99, 0, 64 * draws, "cpu").view(draws, 64)
    found = rounded(values.expand(draws, 64).contiguous(), (bits >> 16) & 0xFFFF).float()
    below, above = neighbours(values)
    assert bool(((found == below) | (found == above)).all())
    share = (values - below) / (above - below)
    error = (above - below).abs() * (share * (1 - share) / draws).sqrt()
    assert bool(((found.mean(0) - values).abs() <= 5 * error + 1e-9).all())
    nearest = (values.bfloat16().float() - values).abs()
    assert (nearest / (error + 1e-9)).max() > 30, "the nearest would pass as well"


def test_what_bfloat16_holds_is_kept_and_what_is_no_number_stays_so() -> None:
    exact = torch.randn(1000).bfloat16().float()
    noise = torch.randint(0, 2**16, (1000,), dtype=torch.int32)
    assert torch.equal(rounded(exact, noise).float(), exact)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    # A NaN with every bit set would become -0 by adding to it.
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    found = rounded(odd, torch.full((6,), 0xFFFF, dtype=torch.int32))
    assert found[[0, 5]].isnan().all() and torch.equal(found[1:5].float(), odd[1:5])


def test_random_bits_are_uniform_and_differ_by_key_and_place() -> None:
    """Each of 32 bits is set half of the time, alone and together with any bit of the next place or key."""
    count = 2**16
    places = torch.arange(32)
    tables = []
    for key in (5, 6, 5 + 2**32, 2**64 - 1):
        bits = random_bits(key, 0, count, "cpu")
        tables.append(((bits.unsqueeze(1) >> places) & 1).float() * 2 - 1)
    together = torch.cat([tables[0][:-1], tables[0][1:], *(table[1:] for table in tables[1:])], 1)
    products = together.T @ together / len(together)
    products.fill_diagonal_(0)
    assert together.mean(0).abs().max() < 5 / count**0.5 and products.abs().max() < 6 / count**0.5


def test_chunks_make_one_sequence() -> None:
    whole = random_bits(77, 0, 100, "cpu")
    assert torch.equal(torch.cat([random_bits(77, 0, 30, "cpu"), random_bits(77, 30, 70, "cpu")]), whole)
    far = random_bits(77, 2**31 - 5, 10, "cpu")
    assert len(set(far.tolist())) == 10, "places past 2^31 repeat"


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_each_step_is_adamw_s_rounded_to_a_neighbour(moments: torch.dtype) -> None:
    """From the same start, in float32, for two weights of which one is more than a chunk."""
    torch.manual_seed(0)
    shapes = [(CPU_CHUNK + 7,), (3, 5)]
    weights = [(torch.randn(shape) * 0.05).bfloat16() for shape in shapes]
    means = [torch.zeros(shape, dtype=moments) for shape in shapes]
    squares = [torch.zeros(shape, dtype=moments) for shape in shapes]
    moved = 0.0
    for step in range(1, 4):
        gradients = [torch.randn(shape).bfloat16() for shape in shapes]
        masters = [torch.nn.Parameter(weight.float()) for weight in weights]
        theirs = torch.optim.AdamW(masters, lr=NUMBERS["rate"], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for master, gradient, mean, square in zip(masters, gradients, means, squares, strict=True):
            master.grad = gradient.float()
            theirs.state[master] = {
                "step": torch.tensor(step - 1.0), "exp_avg": mean.float().clone(), "exp_avg_sq": square.float().clone()
            }  # fmt: skip
        theirs.step()
        rounded_adamw(weights, gradients, means, squares, [step, step + 100], step=step, **NUMBERS)
        for place, master in enumerate(masters):
            exact = theirs.state[master]
            between(weights[place], master.detach())
            for ours, other in ((means[place], exact["exp_avg"]), (squares[place], exact["exp_avg_sq"])):
                if moments == torch.float32:
                    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-8)
                else:
                    between(ours, other)
            moved = max(moved, float((weights[place].float() - master.detach()).abs().max()))
    assert moved > 0, "nothing was rounded"


def between(ours: Tensor, exact: Tensor) -> None:
    """`ours` is one of the two neighbours of `exact`, or of a number a few last bits of float32 from it."""
    slack = exact.abs() * 1e-5 + 1e-12
    below, above = neighbours(exact)
    low, high = torch.minimum(below, above), torch.maximum(below, above)
    assert bool(((ours.float() >= low - slack) & (ours.float() <= high + slack)).all())


def test_small_updates_count_on_average() -> None:
    """A hundred steps, each a 24th of the distance to the next bfloat16: nearest stands still, stochastic arrives."""
    start, rate = 0.05, 1e-5
    weight = torch.full((4096,), start).bfloat16()
    plain = torch.nn.Parameter(weight.clone())
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    theirs = torch.optim.AdamW([plain], lr=rate, weight_decay=0.0)
    rounding = Rounding(rounded_adamw, 3)
    first = weight.clone()
    for step in range(1, 101):
        gradient = torch.ones_like(weight)
        keys = [rounding.key(step, 0)]
        settings = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "decay": 0.0}
        rounded_adamw([weight], [gradient], [mean], [square], keys, step=step, rate=rate, **settings)
        plain.grad = gradient
        theirs.step()
    assert torch.equal(plain.detach(), first)
    assert float((first.float() - weight.float()).mean()) == pytest.approx(100 * rate, rel=0.05)


def test_keys_depend_on_seed_step_and_weight() -> None:
    found = {
        Rounding(rounded_adamw, seed).key(step, number) for seed in (1, 2) for step in (1, 12) for number in (0, 23)
    }
    assert len(found) == 8 and max(found) >= 2**32 and max(found) < 2**64
    assert Rounding(rounded_adamw, 1).key(12, 3) != Rounding(rounded_adamw, 1).key(1, 23), "digits run together"


def test_what_cannot_be_stepped() -> None:
    one = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"a weight is torch\.float32"):
        rounded_adamw([one], [one], [one], [one], [1], step=1, **NUMBERS)
    half = one.bfloat16()
    with pytest.raises(ValueError, match="not contiguous"):
        rounded_adamw([half.T[:, :2]], [half[:, :2]], [half], [half], [1], step=1, **NUMBERS)
