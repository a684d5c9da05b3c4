"""Errors of memory that runs out, where a test wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SAID = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Injection:
    """Raises an out-of-memory error in the forward or the backward of a module, at its calls of these numbers.

    Calls are counted from 0 over the whole run, and `fired` says which raised.
    """

    def __init__(self, module: nn.Module, where: str, calls: Any) -> None:
        self.where, self.calls, self.seen, self.fired = where, calls, 0, list[int]()
        self.handle = module.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, out: Any) -> Any:
        """The module's forward hook."""
        if self.where == "forward":
            self.count()
            return None
        fails: Any = _Failing.apply
        return fails(out, self)

    def count(self) -> None:
        """One call more, which may be one that fails."""
        place, self.seen = self.seen, self.seen + 1
        if place in self.calls:
            self.fired.append(place)
            raise torch.OutOfMemoryError(SAID)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, injection: Injection) -> Tensor:
        ctx.injection = injection
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.injection.count()
        return grads[0], None
