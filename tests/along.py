"""The gradient along itself: how a backward that dropped other numbers than its forward is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def along_gradient(loss: Callable[[], float], weights: Sequence[nn.Parameter], step: float) -> tuple[float, float]:
    """(the gradient's length, the loss's change along it): equal to the second order in `step` if the gradient is the
    loss's own.

    Args:
        loss: The loss at the weights as they are, with its backward; the same random numbers in every call.
        weights: What has gradients after a call. They end where they began, but for rounding.
        step: How far the weights go to either side.
    """
    loss()
    grads = {weight: weight.grad.clone() for weight in weights if weight.grad is not None}
    length = sum(float(grad.norm()) ** 2 for grad in grads.values()) ** 0.5
    assert length > 0, "no weight has a gradient"

    def move(distance: float) -> None:
        with torch.no_grad():
            for weight, grad in grads.items():
                weight.add_(grad, alpha=distance / length)

    sides = []
    for distance in (step, -step):
        move(distance)
        sides.append(loss())
        move(-distance)
    return length, (sides[0] - sides[1]) / (2 * step)
