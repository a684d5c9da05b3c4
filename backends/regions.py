"""The parts of a model that are compiled one by one, and the LoRA layers that become plain products, for one step.

Compiling a whole model takes minutes and again when a shape moves; one layer that all layers share takes seconds
(design: "per-layer compile, regional"). Nothing is left on the model between steps.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ..kernels.light_dropout import LightDropout
from ..kernels.lora import adapter_of, fused_class
from ..kernels.nf4 import Stored, stored

# The share of a layer's activations that is kept for the backward, the cheapest to compute again left out first. Of a
# layer of bge-large 0.7 leaves out the GELU: 753 in place of 1,071 MiB for 32,768 tokens, in less than 1% more time; at
# 0.55 it is 610 MiB and 6% more.
KEPT = 0.7
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
        memory_budget: The share of a layer's activations that may be kept for the backward; the cheapest to compute
            again are left out first (`torch._functorch.config.activation_memory_budget`).
    """

    def __init__(self, model: nn.Module, memory_budget: float = KEPT) -> None:
        self.model = model
        self.layers = repeated_layers(model)
        self.memory_budget = memory_budget
        # A code object of our own: torch keeps compiled variants, and counts them, on the code object.
        own = types.FunctionType(_call.__code__.replace(co_name="layer"), _call.__globals__)
        # Tokens are marked dynamic below: `dynamic=True` would take floats such as a scale for inputs too, and compile
        # C++ to compute with them; marking nothing would compile twice, for the first shape and for all others.
        self._compiled: Callable[..., Any] = torch.compile(own)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compiled layers, joined LoRA products and dropout without masks for the length of a block."""
        with ExitStack() as stack:
            joined = stack.enter_context(fused_adapters(self.model))
            stack.enter_context(light_dropouts(self.layers))
            stack.enter_context(_settings(self.memory_budget))
            layers: list[Any] = self.layers
            for layer in layers:
                layer._compiled_call_impl = partial(self._run, layer)
                layer._own_dtype = _own_dtype(layer, joined)
            try:
                yield
            finally:
                for layer in layers:
                    layer._compiled_call_impl = None
                    del layer._own_dtype

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rows, bounds = _mark_tokens((args, kwargs))
        with _sums_apart() if _fragile(rows, bounds) else nullcontext():
            return self._compiled(layer, *args, **kwargs)


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


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _own_dtype(layer: nn.Module, joined: set[int]) -> torch.dtype | None:
    """The one 16-bit dtype that all of a layer's weights have, those of `joined` apart; None where there is none."""
    weights = (weight for weight in layer.parameters() if id(weight) not in joined)
    dtypes = {weight.dtype for weight in weights if weight.dtype.is_floating_point}  # bits are no dtype of numbers
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@contextmanager
def _settings(memory_budget: float) -> Iterator[None]:
    dynamo: Any = torch._dynamo.config
    functorch: Any = torch._functorch.config
    with (
        dynamo.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=4 * VARIANTS),
        functorch.patch(activation_memory_budget=memory_budget),
    ):
        yield


@contextmanager
def fused_adapters(model: nn.Module) -> Iterator[set[int]]:
    """Every plain LoRA layer of `model` as a product with its effective weight, for the length of a block.

    Yields the `id` of each adapter's A and B.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    few_bits = [layer for layer in layers if (weight := stored(layer.base_layer)) is not None and _hold(layer, weight)]
    try:
        found = [(layer, adapter) for layer in layers if (adapter := adapter_of(layer)) is not None]
        own: list[tuple[nn.Module, Any]] = [(layer, type(layer)) for layer, _ in found]
        with _as_classes({layer: fused_class(kind) for layer, kind in own}):
            yield {id(matrix) for _, adapter in found for matrix in (adapter.down, adapter.up)}
    finally:
        for layer in few_bits:
            del layer.stored


def _hold(layer: Any, weight: Stored) -> bool:
    layer.stored = weight
    return True


def light_dropouts(layers: list[nn.Module]) -> AbstractContextManager[None]:
    """Every `nn.Dropout` in `layers` without a mask that is kept, for the length of a block. Outside compiled layers it
    would cost a kernel for each of its operations."""
    modules = (module for layer in layers for module in layer.modules())
    return _as_classes({module: LightDropout for module in modules if type(module) is nn.Dropout and module.p > 0})


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
