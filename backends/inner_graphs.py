"""The model's forward and its backward as two CUDA graphs for each shape, with the loss between them as it is.

A reranker's loss puts pairs together, asks the model for their scores and compares these on the host: no graph can hold
all of that. The model's part is hundreds of launches; the loss's a few dozen.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.contracts import Inner
from .graphs import GRAPHS, Gradients, cause, held, host_random, load, places_of, shapes_of

Run = Callable[[Mapping[str, Any]], Tensor]


@dataclass(slots=True)
class Halves:
    """Two captured halves: the forward's input buffers and scores, the buffer of the scores' gradient, and the weights
    that the backward adds gradients to."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    scores: Tensor
    gradient: Tensor
    trained: list[nn.Parameter]


class InnerGraphs:
    """Replays `inner.run` for the length of a step. A shape's first forward runs without a graph, as the warm-up; its
    second is captured. A forward before the last one's backward, or without a gradient, runs without a graph too: its
    activations would be where the first's are.

    Args:
        inner: What a step calls.
        model: Whose weights it reads.
        gradients: Those of all graphs of the step's backend.
        counts, say: What is told of steps, as by the backend.
        around: What forward and backward run in where they are no graphs, and what they are captured in.
    """

    def __init__(
        self,
        inner: Inner,
        model: nn.Module,
        gradients: Gradients,
        counts: Counter[str],
        say: Callable[[str], None],
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.inner, self.model, self.gradients, self.counts, self.say = inner, model, gradients, counts, say
        self._around, self._inside = around, False
        self.capture_seconds = 0.0
        self._weights = list(model.parameters())
        self._graphs: OrderedDict[Hashable, Halves] = OrderedDict()
        self._warmed: dict[Hashable, list[nn.Parameter]] = {}
        self._refused: dict[Hashable, str] = {}
        self._anchor: Tensor | None = None
        self._open = False
        self._plain: Run = inner.run
        self._step = ExitStack()
        self._watching: list[tuple[Hashable, dict[nn.Parameter, None]]] = []

    def forget(self) -> None:
        """Let go of all graphs and of what was found out of shapes."""
        for kept in (self._graphs, self._warmed, self._refused):
            kept.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Graphs for the length of a step, forward and backward."""
        self._plain, self._open, self._inside, self._watching = self.inner.run, False, False, []
        with ExitStack() as self._step:
            self.inner.run = self._run
            try:
                yield
            finally:
                self.inner.run = self._plain
            for key, trained in self._watching:  # not of a step that failed: its backward may not have reached them all
                if trained:
                    self._warmed[key] = list(trained)

    def _run(self, inputs: Mapping[str, Any]) -> Tensor:
        if not torch.is_grad_enabled():
            return self._without(inputs, "a forward without a gradient")
        if self._open:
            return self._without(inputs, "a forward before the last one's backward")
        key = self._key(inputs)
        if key in self._refused:
            return self._without(inputs, self._refused[key])
        if key not in self._warmed:
            return self._warm(key, inputs)
        if key not in self._graphs and not self._capture(key, inputs):
            return self._without(inputs, self._refused[key])
        self._graphs.move_to_end(key)
        if self._anchor is None:  # what gives the scores a gradient: the weights' own are inside the graph
            self._anchor = torch.zeros((), device=self._graphs[key].scores.device, requires_grad=True)
        return cast(Tensor, _Replayed.apply(self._anchor, self, self._graphs[key], inputs))  # type: ignore[no-untyped-call]

    def _without(self, inputs: Mapping[str, Any], reason: str) -> Tensor:
        self.counts[reason] += 1
        self.say(f"forwards run without a CUDA graph: {reason}")
        self._enter()
        return self._plain(inputs)

    def _enter(self) -> None:
        """What `around` sets up lasts to the end of the step: a backward needs it too. A step that only replays does
        without (with 24 layers under an adapter it takes the host longer than the GPU computes)."""
        if not self._inside:
            self._step.enter_context(self._around())
            self._inside = True

    def _key(self, inputs: Mapping[str, Any]) -> Hashable:
        """What captured halves must find unchanged: shapes, precision, and where the weights lie."""
        cast_to = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return shapes_of(inputs), places_of(self._weights), cast_to, self.model.training

    def _warm(self, key: Hashable, inputs: Mapping[str, Any]) -> Tensor:
        """A shape's first forward; its backward, before the step ends, shows which weights get gradients."""
        self.counts["warm-up"] += 1
        self._open = True
        self._watching.append((key, self._step.enter_context(self.gradients.watched(self._weights))))
        self._enter()
        state = host_random()
        scores = self._plain(inputs)
        if host_random() != state:
            self._refused[key] = "the model draws random numbers on the host"
        return scores

    def _capture(self, key: Hashable, inputs: Mapping[str, Any]) -> bool:
        started = time.perf_counter()
        trained = self._warmed[key]
        own = held(inputs)
        halves = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._enter()
        try:
            with self.gradients.in_place(trained) as pool:
                # The loader's thread pins memory meanwhile, which only this mode of capture allows.
                with _own_casts(), torch.cuda.graph(halves[0], pool=pool, capture_error_mode="thread_local"):
                    scores = self._plain(own)
                gradient = torch.zeros_like(scores)
                with torch.cuda.graph(halves[1], pool=pool, capture_error_mode="thread_local"):
                    torch.autograd.backward(scores, gradient)
        except RuntimeError as error:
            self.gradients.end_failed_capture()
            self._refused[key] = f"this forward cannot be captured ({cause(error)})"
            return False
        while len(self._graphs) >= GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[key] = Halves(*halves, own, scores.detach(), gradient, trained)
        self.counts["captured"] += 1
        self.capture_seconds += time.perf_counter() - started
        return True

    def _begin(self, halves: Halves, inputs: Mapping[str, Any]) -> Tensor:
        self._open = True
        load(halves.inputs, inputs)
        halves.forward.replay()
        return halves.scores.clone()

    def _end(self, halves: Halves, gradient: Tensor) -> None:
        halves.gradient.copy_(gradient)
        self.gradients.ready(halves.trained)
        halves.backward.replay()
        self._open = False
        self.counts["replayed"] += 1


@contextmanager
def _own_casts() -> Iterator[None]:
    """The weights that autocast has cast before are not used in the block, nor the block's after it: a graph casts its
    own, in every replay. Switching autocast's memory off would do, and have every layer compiled again."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Replayed(torch.autograd.Function):
    """The scores of a replayed forward, whose gradient is handed to the replayed backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphs: InnerGraphs, halves: Halves, inputs: Mapping[str, Any]) -> Tensor:
        ctx.graphs, ctx.halves = graphs, halves
        return graphs._begin(halves, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.graphs._end(ctx.halves, gradients[0])
        return None, None, None, None
