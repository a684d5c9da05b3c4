"""The reference step under an activation budget: transformers' checkpointing for as many layers as the budget says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.contracts import StepContext
from ..core.errors import ModelError
from .activations import Activations
from .regions import largest, memory_of, repeated_layers


class BudgetedStep:
    """Sentence Transformers' step with the last layers' checkpointing off, as many as fit.

    How many is decided before a step by the most tokens that a forward had so far: transformers asks a layer's flag
    before it shows the layer its input.
    """

    def __init__(self, context: StepContext) -> None:
        self.context = context
        layers = repeated_layers(context.model)
        self.layers: list[Any] = [layer for layer in layers if hasattr(layer, "gradient_checkpointing")]
        if not self.layers:
            fix = "Pass use_gradient_checkpointing=True without a budget"
            raise ModelError("no layer can be checkpointed by itself", where="activation_budget_gb", fix=fix)
        self.activations = Activations(len(self.layers), context.checkpointing, context.activation_budget, context.say)
        self.tokens = 0
        """The most that a layer was called with."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        with self._chosen(memory_of(model)):
            return self.context.eager(model, batch, items)

    @contextmanager
    def _chosen(self, weights: frozenset[int]) -> Iterator[None]:
        before = [layer.gradient_checkpointing for layer in self.layers]
        for place, layer in enumerate(self.layers):
            layer.gradient_checkpointing = self.activations.kind(place, self.tokens) != "kept"
            layer._compiled_call_impl = partial(self._call, layer, weights)
        try:
            yield
        finally:
            for layer, flag in zip(self.layers, before, strict=True):
                layer.gradient_checkpointing = flag
                layer._compiled_call_impl = None

    def _call(self, layer: Any, weights: frozenset[int], *args: Any, **kwargs: Any) -> Any:
        states = largest((args, kwargs))
        tokens = states.shape[:-1].numel()
        self.tokens = max(self.tokens, tokens)
        if layer.gradient_checkpointing:
            on_host = self.activations.spare == "offload" and states.is_cuda
            size = 0.0 if on_host else states.nbytes / tokens
            self.activations.bytes_per_token.setdefault(self.activations.spare, size)
            return layer._call_impl(*args, **kwargs)
        with self.activations.watch("kept", tokens, weights):
            return layer._call_impl(*args, **kwargs)
