"""The parts of a model that are compiled one by one, and the LoRA layers that become plain products, for one step.

Compiling a whole model takes minutes and again when a shape moves; one layer that all layers share takes seconds
(design: "per-layer compile, regional"). Nothing is left on the model between steps.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ..core.contracts import StepContext
from ..kernels.light_dropout import LightDropout, seeded
from ..kernels.lora import adapter_of, fused_class
from ..kernels.nf4 import Stored, stored
from .activations import SHARES, Activations, Kind
from .offload import Offload

# Each layer's dtype, mode and mask makes a variant of the compiled code; torch's own limit of 8 is for one function in
# a program, and above it torch goes on uncompiled.
VARIANTS = 64


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers a model repeats: the members of each outermost `nn.ModuleList` of two or more."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1:
                found.extend(child)
            else:
                look(child)

    look(model)
    return found


class Regions:
    """The repeated layers of one model, compiled together at their first call.

    Args:
        model: A model in training.
        activations: What each layer keeps for its backward; by default `activations.KEPT` of all.
    """

    def __init__(self, model: nn.Module, activations: Activations | None = None) -> None:
        self.model = model
        self.layers = repeated_layers(model)
        self.activations = activations or Activations(len(self.layers))
        self.offload = Offload()
        self.own_checkpoints: bool | None = None
        """Whether layers are computed again by what is compiled here; None before the first was called. Not where a
        layer draws random numbers that would be others the second time: transformers' checkpointing does those."""
        self._compiled: dict[float, Callable[..., Any]] = {}
        self._parameters: frozenset[int] = frozenset()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compiled layers, joined LoRA products and dropout without masks for the length of a block."""
        with ExitStack() as stack:
            joined = stack.enter_context(fused_adapters(self.model))
            if self.activations.budget is not None:  # else nothing is counted
                self._parameters = memory_of(self.model)
            stack.enter_context(light_dropouts(self.layers))
            stack.enter_context(_settings())
            layers: list[Any] = self.layers
            # transformers' selective contexts do not see into compiled code.
            if self.own_checkpoints is not False or self.activations.option == "selective":
                stack.enter_context(_no_checkpoints(layers))
            for place, layer in enumerate(layers):
                layer._compiled_call_impl = partial(self._run, place, layer)
                layer._own_dtype = _own_dtype(layer, joined)
            try:
                yield
            finally:
                for layer in layers:
                    layer._compiled_call_impl = None
                    del layer._own_dtype

    def _run(self, place: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rows, bounds = _mark_tokens((args, kwargs))
        states = largest((args, kwargs))
        tokens = states.shape[:-1].numel()
        kind = self._kind(place, tokens, states, layer, args, kwargs)
        with ExitStack() as stack:
            if kind != "kept" or layer.training:
                stack.enter_context(seeded(states, again=kind != "kept"))
            if kind == "offload":
                stack.enter_context(self.offload.of(states))
            stack.enter_context(self.activations.watch(kind, tokens, self._parameters))
            if _fragile(rows, bounds):
                stack.enter_context(_sums_apart())
            stack.enter_context(_share(SHARES[kind]))
            return self._variant(SHARES[kind])(layer, *args, **kwargs)

    def _kind(self, place: int, tokens: int, states: torch.Tensor, layer: nn.Module, args: Any, kwargs: Any) -> Kind:
        """What this call keeps. Whether layers can be computed again is tried at the first that is to be."""
        kind: Kind = self.activations.kind(place, tokens) if torch.is_grad_enabled() else "kept"
        if kind == "kept" or self.own_checkpoints:
            return kind
        if self.own_checkpoints is None:
            self.own_checkpoints = not _draws(layer, states, args, kwargs)
            if not self.own_checkpoints:
                instead = "its activations are kept: pass use_gradient_checkpointing=True for less memory"
                if self.activations.option != "selective":
                    instead = "it is left to transformers' checkpointing: no CUDA graph, all or nothing of a layer"
                self.activations.say(f"{type(layer).__name__} draws random numbers of its own, so that {instead}")
        return kind if self.own_checkpoints else "kept"

    def _variant(self, share: float) -> Callable[..., Any]:
        """The compiled call for layers that keep this share of their activations."""
        if share not in self._compiled:
            # A code object of our own: torch keeps compiled variants, and counts them, on the code object.
            own = types.FunctionType(_call.__code__.replace(co_name="layer"), _call.__globals__)
            # Tokens are marked dynamic: `dynamic=True` would take floats such as a scale for inputs too, and compile
            # C++ to compute with them; marking nothing would compile twice, for the first shape and for all others.
            self._compiled[share] = torch.compile(own)
        return self._compiled[share]


def memory_of(model: nn.Module) -> frozenset[int]:
    """Where the memory begins of all that a model holds between steps."""
    return frozenset(weight.untyped_storage().data_ptr() for weight in _weights(model))


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    """Weights and buffers, scales and tables of weights in few bits too."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(held := vars(module).get("stored"), Stored):
            yield from (field for field in held if isinstance(field, torch.Tensor))


def regions_of(context: StepContext) -> Regions:
    """The layers of the model that a backend is to train, keeping what the user asked for."""
    count = len(repeated_layers(context.model))
    chosen = Activations(count, context.checkpointing, context.activation_budget, context.say)
    return Regions(context.model, chosen)


def _draws(layer: nn.Module, states: torch.Tensor, args: Any, kwargs: Any) -> bool:
    """Whether a call of `layer` moves torch's random generator, given a seed for all that can do with one."""
    with torch.no_grad(), seeded(states):
        before = _generator(states)
        _call(layer, *args, **kwargs)
        return bool(_generator(states) != before)


def _generator(states: torch.Tensor) -> Any:
    if not states.is_cuda:
        return torch.get_rng_state().numpy().tobytes()
    return torch.cuda.default_generators[states.get_device()].get_offset()


@contextmanager
def _no_checkpoints(layers: list[Any]) -> Iterator[None]:
    """transformers' checkpointing off, layer by layer, for the length of a block."""
    own = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    for layer in own:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in own:
            layer.gradient_checkpointing = True


def _mark_tokens(value: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tell the compiler which sizes change from batch to batch, and return what has them: every packed row of tokens,
    and every list of bounds."""
    rows, bounds = [], []
    for tensor in _tensors(value):
        if tensor.dim() == 1 and not tensor.is_floating_point():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            bounds.append(tensor)
        elif tensor.dim() >= 2 and tensor.shape[0] == 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
            rows.append(tensor)
    return rows, bounds


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _fragile(rows: list[torch.Tensor], bounds: list[torch.Tensor]) -> bool:
    """Whether inductor had better not sum a norm's weight gradient in the norm's own kernel (`mix_order_reduction`).

    It does so from 5 Mi elements on, and compiles again where a batch is on the other side: for 5 s, in the middle of a
    run. And where all texts may have one length L, attention asks for N L tokens of N + 1 bounds: to the compiler the
    tokens are then L bounds less L, a sum, around which torch before 2.13 forgets the brackets (shape '[2048, 1024]' is
    invalid for input of size 0).
    """
    whole = any(row.shape[1] % max(1, bound.shape[0] - 1) == 0 for row in rows for bound in bounds)
    largest = max((row.numel() for row in rows), default=0)
    return (whole and Version(torch.__version__) < Version("2.13")) or largest < 4 * 5 * 2**20


def _sums_apart() -> AbstractContextManager[Any]:
    inductor: Any = importlib.import_module("torch._inductor.config")
    changed: AbstractContextManager[Any] = inductor.patch({"triton.mix_order_reduction": False})
    return changed


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = layer._own_dtype
    if dtype is None:
        return layer._call_impl(*args, **kwargs)
    # Autocast would make the norms' results float32, and with them the residual stream: twice the traffic and memory.
    args = tuple(value.to(dtype) if _is_real(value) else value for value in args)
    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        return layer._call_impl(*args, **kwargs)


def largest(value: Any) -> torch.Tensor:
    """Of all tensors of numbers in a layer's arguments the largest: its input."""
    found: torch.Tensor = max((tensor for tensor in _tensors(value) if _is_real(tensor)), key=torch.numel)
    return found


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _own_dtype(layer: nn.Module, joined: set[int]) -> torch.dtype | None:
    """The one 16-bit dtype that all of a layer's weights have, those of `joined` apart; None where there is none."""
    weights = (weight for weight in layer.parameters() if id(weight) not in joined)
    dtypes = {weight.dtype for weight in weights if weight.dtype.is_floating_point}  # bits are no dtype of numbers
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@contextmanager
def _settings() -> Iterator[None]:
    dynamo: Any = torch._dynamo.config
    inductor: Any = importlib.import_module("torch._inductor.config")
    # torch's own random numbers, which are kept: inductor makes its own again in the backward where few activations are
    # kept, and makes others (torch 2.13, attention's dropout on a CPU: the gradient was 13 degrees off).
    with (
        dynamo.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=4 * VARIANTS),
        inductor.patch(fallback_random=True),
    ):
        yield


def _share(share: float) -> AbstractContextManager[Any]:
    functorch: Any = torch._functorch.config
    changed: AbstractContextManager[Any] = functorch.patch(activation_memory_budget=share)
    return changed


@contextmanager
def fused_adapters(model: nn.Module) -> Iterator[set[int]]:
    """Every plain LoRA layer of `model` as a product with its effective weight, for the length of a block.

    Yields the `id` of each adapter's A and B.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    few_bits = {layer: weight for layer in layers if (weight := stored(layer.base_layer)) is not None}
    for layer, weight in few_bits.items():
        layer.stored = weight
    try:
        found = [(layer, adapter) for layer in layers if (adapter := adapter_of(layer)) is not None]
        own: list[tuple[nn.Module, Any]] = [(layer, type(layer)) for layer, _ in found]
        with _as_classes({layer: fused_class(kind) for layer, kind in own}):
            yield {id(matrix) for _, adapter in found for matrix in (adapter.down, adapter.up)}
    finally:
        for layer in few_bits:
            del layer.stored


@contextmanager
def light_dropouts(layers: list[nn.Module]) -> Iterator[None]:
    """Every `nn.Dropout` in `layers` without a mask that is kept, for the length of a block. Outside compiled layers it
    would cost a kernel for each of its operations."""
    found: dict[nn.Module, Any] = {}
    for layer in layers:
        own: list[Any] = [module for module in layer.modules() if type(module) is nn.Dropout and module.p > 0]
        for place, module in enumerate(own, 1):
            module.place = place
            found[module] = LightDropout
    try:
        with _as_classes(found):
            yield
    finally:
        for dropout in found:
            del dropout.place


@contextmanager
def _as_classes(kinds: dict[nn.Module, Any]) -> Iterator[None]:
    own = {module: type(module) for module in kinds}
    try:
        for module, kind in kinds.items():
            module.__class__ = kind
        yield
    finally:
        for module, before in own.items():
            module.__class__ = before
