"""transformers' filter of losses that are not finite, on the device: its own waits for the device in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LoggedLoss:
    """Replaces a loss that is not finite by the mean of those since the last log, as `logging_nan_inf_filter` asks.

    Only what is logged changes, never a gradient. While a step is out, transformers' own filter is switched off.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._steps = 0
        self._taken = False

    def filtered(self, loss: Tensor, arguments: Any) -> Tensor:
        """`loss`, or what is logged in its place; a scalar on the same device."""
        if not (arguments.logging_nan_inf_filter or self._taken):
            return loss
        arguments.logging_nan_inf_filter, self._taken = False, True
        if self._total is None:
            self._total = torch.zeros_like(loss)
        kept = torch.where(torch.isfinite(loss), loss, self._total / (1 + self._steps))
        self._total = self._total + kept
        self._steps += 1
        return kept

    def restore(self, arguments: Any, *, logging: bool) -> None:
        """Give transformers its filter back, before it logs, saves or evaluates; `logging` starts the mean anew."""
        if self._taken:
            arguments.logging_nan_inf_filter, self._taken = True, False
        if logging:
            self._total, self._steps = None, 0
