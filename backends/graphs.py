"""What CUDA graphs of a step need whatever part of it they hold: gradients that stay in place, and failed captures."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Shapes with a graph at a time. All graphs share one memory pool, so that another costs its loss and its launch
# records, a few MiB; the least recently used goes first.
GRAPHS = 32


class Gradients:
    """One gradient for each weight, in place for as long as graphs add to it, and the pool that graphs share."""

    def __init__(self) -> None:
        self.own: dict[nn.Parameter, Tensor] = {}
        self.pool: Any = None

    def clear(self) -> None:
        """Let go of both."""
        self.own.clear()
        self.pool = None

    @contextmanager
    def watched(self, weights: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, None]]:
        """The weights that get a gradient in the block, in order. Those whose gradient is kept here are lent it, rather
        than that there be a second set."""
        trained: dict[nn.Parameter, None] = {}
        hooks, lent = [], []
        for weight in weights:
            if not weight.requires_grad:
                continue
            if weight.grad is None and weight in self.own:
                weight.grad = self.own[weight].zero_()
                lent.append(weight)
            watched: Any = weight
            hooks.append(watched.register_post_accumulate_grad_hook(trained.setdefault))
        try:
            yield trained
        finally:
            for hook in hooks:
                hook.remove()
            for weight in lent:
                if weight not in trained:
                    weight.grad = None

    @contextmanager
    def in_place(self, trained: Iterable[nn.Parameter]) -> Iterator[Any]:
        """The kept gradients on the weights for the length of a capture, and the pool to capture into."""
        kept = {weight: weight.grad for weight in trained}
        for weight in kept:
            if weight not in self.own:
                self.own[weight] = torch.zeros_like(weight)
            weight.grad = self.own[weight]
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # what the warm-up held: the graph's own pool holds as much
        try:
            yield self.pool
        finally:
            for weight, grad in kept.items():
                weight.grad = grad

    def ready(self, trained: Iterable[nn.Parameter]) -> None:
        """Have each weight's gradient where the graphs add to it, with what it held."""
        fresh = []
        for weight in trained:
            own = self.own[weight]
            if weight.grad is None:
                fresh.append(own)
            elif weight.grad is not own:
                own.copy_(weight.grad)
            weight.grad = own
        if fresh:
            torch._foreach_zero_(fresh)

    def end_failed_capture(self) -> None:
        """A capture that failed leaves torch's generator in capture mode, where it refuses every number, and the pool
        taken for one that is still captured into: give it a copy, and another pool."""
        torch.cuda.synchronize()
        generator: Any = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        self.pool = None


def shapes_of(batch: Mapping[str, Any]) -> Hashable:
    """What a captured step must find unchanged in a batch: each tensor's shape and dtype, and whatever is no tensor."""
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in batch.items()
    )


def places_of(weights: Iterable[nn.Parameter]) -> int:
    """A hash of where weights lie, and which of them train."""
    return hash(tuple((weight.data_ptr(), weight.requires_grad) for weight in weights))


def held(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose tensors a graph can read in every replay: copies, for `load` to write to."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


def load(inputs: dict[str, Any], batch: Mapping[str, Any]) -> None:
    """Copy a batch's tensors to where a graph reads them."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(batch[name], non_blocking=True)


def host_random() -> tuple[Any, ...]:
    """The state of the host's generators, which a graph does not move."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def cause(error: BaseException) -> str:
    """The first line of what made a capture fail: the end of a capture that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
