"""The Triton version of `rounded_adamw` under the interpreter: the plain version's numbers, place by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.core.testing.operations import OPERATIONS
from burnish.kernels import adamw, adamw_tiles


def test_it_is_the_plain_one() -> None:
    told = OPERATIONS["rounded_adamw"](adamw_tiles.rounded_adamw, adamw.rounded_adamw, torch.float64, "cpu", 1e-5)
    assert "cases" in told


def test_other_random_numbers_would_be_found() -> None:
    def other(weights: Any, gradients: Any, means: Any, squares: Any, keys: Any, **numbers: Any) -> None:
        adamw_tiles.rounded_adamw(weights, gradients, means, squares, [key ^ 1 for key in keys], **numbers)

    with pytest.raises(AssertionError, match="are not the plain version's"):
        OPERATIONS["rounded_adamw"](other, adamw.rounded_adamw, torch.float64, "cpu", 1e-5)


def test_addresses_that_are_not_aligned() -> None:
    """A weight that begins in the middle of another tensor."""

    def run(step: Any) -> list[Tensor]:
        torch.manual_seed(0)
        stores = [torch.rand(2051).bfloat16() for _ in range(4)]
        parts = [store[1:-1] for store in stores]
        step(*([part] for part in parts), [5], step=1, rate=1e-2, beta1=0.9, beta2=0.99, epsilon=1e-8, decay=0.1)
        return stores

    mine, plain = run(adamw_tiles.rounded_adamw), run(adamw.rounded_adamw)
    assert mine[0].data_ptr() % 16 == 0
    for ours, theirs in zip(mine, plain, strict=True):
        assert (ours != theirs).float().mean() <= 0.005


def test_weights_without_numbers() -> None:
    none, some = torch.zeros(0, 3).bfloat16(), torch.ones(3).bfloat16()
    numbers: dict[str, Any] = {"step": 1, "rate": 0.5, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "decay": 0.0}
    for weights in ([none], [none, some]):
        parts = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
        adamw_tiles.rounded_adamw(
            weights, [weight + 1 for weight in weights], parts[0], parts[1], [1, 2][: len(weights)], **numbers
        )
    assert torch.equal(some, torch.full((3,), 0.5).bfloat16())


def test_infinities_and_nan() -> None:
    values = torch.tensor([float("inf"), float("nan"), 1.0, -float("inf")]).bfloat16()
    zeros = [torch.zeros_like(values) for _ in range(3)]
    adamw_tiles.rounded_adamw(
        [values], [zeros[0]], [zeros[1]], [zeros[2]], [3],
        step=1, rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, decay=0.0,
    )  # fmt: skip
    assert values[0] == float("inf") and values[1].isnan() and values[2] == 1 and values[3] == -float("inf")
