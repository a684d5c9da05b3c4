"""The fused backend: a step as one CUDA graph for each shape, of compiled layers, for CUDA devices.

A step of 24 layers under an adapter costs about 300 ms of CPU to launch, whatever its size (design: "where the time
goes"); its graph costs one launch. Batches come filled up to a few shapes. A shape's first step runs without a graph,
as the warm-up that capture needs; the graph is captured at its second and replayed from then on.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contracts import BackendSpec, Needs, Step, StepContext
from ..core.hookspecs import hookimpl
from .graphs import GRAPHS, Gradients, cause, held, host_random, load, places_of, shapes_of
from .inner_graphs import InnerGraphs
from .regions import regions_of


@dataclass(slots=True)
class Graph:
    """A captured step: its input buffers, its loss, and the parameters it adds gradients to."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    loss: Tensor
    trained: list[nn.Parameter]


class FusedStep:
    """A training step that replays one CUDA graph for each shape of batch, or two, of the model's forward and backward,
    where the rest of the step works on the host (`StepContext.inner`).

    `counts` says how many steps were replayed, captured and run without a graph, the latter by reason.
    `capture_seconds` is what warm-ups' captures took.
    """

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.regions = regions_of(context)
        self.counts: Counter[str] = Counter()
        self.gradients = Gradients()
        self.inner: InnerGraphs | None = None
        if context.inner is not None:
            self.inner = InnerGraphs(
                context.inner, context.model, self.gradients, self.counts, context.say, self.regions.active
            )
        self._seconds = 0.0
        self._parameters = list(context.model.parameters())
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._warmed: dict[Hashable, list[nn.Parameter]] = {}
        self._refused: dict[Hashable, str] = {}
        self._never = _uncapturable(context)

    @property
    def capture_seconds(self) -> float:
        """Seconds that captures took."""
        return self._seconds + (self.inner.capture_seconds if self.inner is not None else 0.0)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        if (never := self._never or self.context.host_work(batch)) is not None:
            return self._without(model, batch, items, never)
        if self.inner is not None:
            with self.inner.active():
                return self.context.eager(model, batch, items)
        key = self._key(batch, items)
        if key in self._refused:
            return self._without(model, batch, items, self._refused[key])
        graph = self._graphs.get(key)
        if graph is None and key not in self._warmed:
            return self._warm(key, model, batch, items)
        if graph is None:
            graph = self._capture(key, model, batch, items)
            if graph is None:
                return self._without(model, batch, items, self._refused[key])
        self._graphs.move_to_end(key)
        return self._replay(graph, batch)

    def forget(self) -> None:
        """Let go of all graphs, of the memory that they and the gradients hold, and of what was found out of shapes."""
        for kept in (self._graphs, self._warmed, self._refused, self.gradients):
            kept.clear()
        if self.inner is not None:
            self.inner.forget()

    def _key(self, batch: Mapping[str, Any], items: Any) -> Hashable:
        """What a captured step must find unchanged: shapes, constants, and where the weights lie."""
        constant = None if isinstance(items, Tensor) else items
        return shapes_of(batch), constant, self.context.constants(), places_of(self._parameters)

    def _without(self, model: nn.Module, batch: Mapping[str, Any], items: Any, reason: str) -> Tensor:
        self.counts[reason] += 1
        self.context.say(f"steps run without a CUDA graph: {reason}")
        with self.regions.active():
            return self.context.eager(model, batch, items)

    def _warm(self, key: Hashable, model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        """A shape's first step; it shows which parameters get gradients, and whether the host draws random numbers."""
        self.counts["warm-up"] += 1
        state = host_random()
        with self.gradients.watched(self._parameters) as trained, self.regions.active():
            loss = self.context.eager(model, batch, items)
        if host_random() != state:
            self._refused[key] = "the step draws random numbers on the host"
        self._warmed[key] = list(trained)
        return loss

    def _capture(self, key: Hashable, model: nn.Module, batch: Mapping[str, Any], items: Any) -> Graph | None:
        started = time.perf_counter()
        trained = self._warmed[key]
        inputs = held(batch)
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's thread pins memory meanwhile, which only this mode of capture allows.
            with (
                self.gradients.in_place(trained) as pool,
                self.regions.active(),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                loss = self.context.eager(model, dict(inputs), items)
        except RuntimeError as error:
            self.gradients.end_failed_capture()
            self._refused[key] = f"this step cannot be captured ({cause(error)})"
            return None
        while len(self._graphs) >= GRAPHS:
            self._graphs.popitem(last=False)
        found = self._graphs[key] = Graph(graph, inputs, loss, trained)
        self.counts["captured"] += 1
        self._seconds += time.perf_counter() - started
        return found

    def _replay(self, graph: Graph, batch: Mapping[str, Any]) -> Tensor:
        load(graph.inputs, batch)
        self.gradients.ready(graph.trained)
        graph.graph.replay()
        self.counts["replayed"] += 1
        return graph.loss.clone()


def _uncapturable(context: StepContext) -> str | None:
    """Why no step of this run can be captured; None if they can."""
    losses = context.loss.values() if isinstance(context.loss, dict) else [context.loss]
    for loss in losses if context.inner is None else ():
        # What a loss does on the host, a graph does not do again: ours and Sentence Transformers' are known.
        if not type(loss).__module__.startswith(("sentence_transformers.", "burnish.")):
            return f"{type(loss).__name__} is not a loss that Burnish knows to be the same in every step"
        if any(hasattr(module, "mini_batch_size") for module in loss.modules()):
            return f"{type(loss).__name__} cuts its batch on the host"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "gradients are exchanged between processes"
    if context.checkpointing == "offload":
        return "layers' inputs go to host memory"
    if getattr(context.arguments, "optimizer_in_backward", False):
        return "weights are stepped inside the backward, and their gradients freed"
    if getattr(context.arguments, "sparse_embeddings", False):
        return "the rows of a sparse gradient are another number in every batch"
    return None


def build_step(context: StepContext) -> Step:
    """A step that captures and replays; see `FusedStep`."""
    return FusedStep(context)


@hookimpl
def burnish_register_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(
            name="fused", summary="one CUDA graph a step, layers compiled, LoRA without its traffic",
            build_step=build_step, priority=20, few_shapes=True,
            needs=Needs(devices=("cuda",), compute_capability=(7, 0), packages=("triton",)),
        )
    ]  # fmt: skip
