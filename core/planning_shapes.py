"""What a memory plan needs to know of a model, found on the meta device: a config is enough, no weight is read.

One forward without data shows, for every repeated layer, which linear layers read the same tensor, what they write, and
which of them read the residual stream or a norm of it. No architecture is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import lora_layers
from .errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .contracts import LoraTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The sizes of one model, in numbers of weights or of elements; what they weigh depends on how it is trained.

    Args:
        hidden: Width of the residual stream.
        layers: Repeated layers.
        weights: All weights of the transformer.
        tables: Those of its embedding tables.
        linear: Those of all its linear layers, which 4 or 8 bits can store.
        repeated: Those of the linear layers in the repeated layers.
        largest: Those of the largest linear layer.
        kept: Elements a token that the backward of all repeated layers needs (`_kept`).
        widest: The same of the layer with most of them.
        adapted: Input and output features of all layers that LoRA adapts by default: an adapter has `rank` times as
            many weights.
        after: Weights of modules after the pooling (Dense).
        spared: Elements a token that all layers keep less where every text has one length (`_spared`).
    """

    hidden: int
    layers: int
    weights: int
    tables: int
    linear: int
    repeated: int
    largest: int
    kept: int
    widest: int
    adapted: int
    after: int = 0
    spared: int = 0


def shapes_of(
    config: PretrainedConfig, targets: LoraTargets, *, after: int = 0, trust_remote_code: bool = False
) -> Shapes:
    """The sizes of the transformer with this config.

    Args:
        config: The transformer's config.
        targets: The layers that LoRA adapts by default (`Family.lora`).
        after: Weights of modules after the pooling.
        trust_remote_code: Whether the repository's own Python may run.

    Raises:
        ModelError: If the model has no repeated layers, or does not run on the meta device.
    """
    model = skeleton(config, trust_remote_code=trust_remote_code)
    layers = repeated_layers(model)
    where = f"{config.model_type} model"
    if not layers:
        fix = "Train it and read the figures of torch.cuda.max_memory_allocated"
        raise ModelError("its memory cannot be planned: it repeats no layer", where=where, fix=fix)
    traces = _trace(model, layers, where)
    linears = {id(module): module for module in model.modules() if isinstance(module, nn.Linear)}
    inside = {id(part) for layer in layers for part in layer.modules()}
    kept = [_kept(trace) for trace in traces]
    names, _ = lora_layers(model, targets)
    return Shapes(
        hidden=traces[0].width,
        layers=len(layers),
        weights=sum(weight.numel() for weight in model.parameters()),
        tables=sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)),
        linear=sum(module.weight.numel() for module in linears.values()),
        repeated=sum(module.weight.numel() for key, module in linears.items() if key in inside),
        largest=max((module.weight.numel() for module in linears.values()), default=0),
        kept=sum(kept),
        widest=max(kept),
        adapted=sum(sum(_weight(model.get_submodule(name)).shape) for name in names),
        after=after,
        spared=_spared(config, len(layers)),
    )


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The transformer on the meta device: every module and shape, no weight."""
    from transformers import AutoModel

    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    return model


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers a model repeats: the members of each outermost `nn.ModuleList` of two or more."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            found.extend(child)
        else:
            found.extend(repeated_layers(child))
    return found


@dataclass(slots=True)
class _Trace:
    """What one layer did in a forward: its linear layers in order, and which tensors were the stream or a norm of it.

    `normed` is whether a norm of the stream came after the last linear layer. `reads` has (the input's id, its width,
    the output's width) for each linear layer. `alive` holds every tensor, so that no id comes twice.
    """

    width: int
    stream: set[int]
    reads: list[tuple[int, int, int]]
    alive: list[Any]
    normed: bool = False


def _trace(model: PreTrainedModel, layers: list[nn.Module], where: str) -> list[_Trace]:
    """Run the model on eight tokens without data, and watch its layers."""
    traces = [_Trace(0, set(), [], []) for _ in layers]
    with _watched(layers, traces), torch.no_grad():
        try:
            model(input_ids=torch.zeros((1, 8), dtype=torch.long, device="meta"))
        except Exception as error:  # the model's own code, which may be anybody's
            fix = "Train it and read the figures of torch.cuda.max_memory_allocated"
            what = f"its memory cannot be planned: it does not run without weights ({type(error).__name__}: {error})"
            raise ModelError(what, where=where, fix=fix) from error
    if not all(trace.reads and trace.width for trace in traces):
        what = "its memory cannot be planned: a repeated layer has no linear layer that takes tokens"
        fix = "Train it and read the figures of torch.cuda.max_memory_allocated"
        raise ModelError(what, where=where, fix=fix)
    return traces


@contextmanager
def _watched(layers: list[nn.Module], traces: list[_Trace]) -> Iterator[None]:
    hooks = []
    for layer, trace in zip(layers, traces, strict=True):
        hooks.append(layer.register_forward_pre_hook(_entry(trace), with_kwargs=True))
        for part in layer.modules():
            if isinstance(getattr(part, "weight", None), Tensor) and not list(part.children()):
                hooks.append(part.register_forward_hook(_call(trace)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entry(trace: _Trace) -> Any:
    def entered(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if found:  # the first is the residual stream; masks and rotary tables may follow
            trace.width = found[0].shape[-1]
            trace.stream.add(id(found[0]))
            trace.alive.append(found[0])

    return entered


def _call(trace: _Trace) -> Any:
    def called(part: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            return
        trace.alive += [args[0], out]
        if _weight(part).dim() == 1:  # a norm: its result is what the next product reads
            if out.shape[-1] == trace.width:
                trace.stream.add(id(out))
                trace.normed = True
        else:
            trace.normed = False
            trace.reads.append((id(args[0]), args[0].shape[-1], out.shape[-1]))

    return called


def _weight(part: Any) -> Tensor:
    weight: Tensor = part.weight
    return weight


def _kept(trace: _Trace) -> int:
    """Elements a token that a layer keeps for its backward, by its products.

    Each product keeps what it reads, once for all that read the same; and what it writes is kept by what comes next,
    attention or an activation, unless it is added to the stream. What the last product reads comes out of an activation
    function and is computed again. A layer that ends in a norm keeps what that reads, too, which cannot be told from
    the next layer's input.
    """
    inputs = {key: width for key, width, _ in trace.reads}
    last = trace.reads[-1][0]
    if last not in trace.stream:
        inputs.pop(last)
    outputs = sum(out for key, _, out in trace.reads if out != trace.width or key in trace.stream)
    return sum(inputs.values()) + outputs + trace.normed * trace.width


def _spared(config: PretrainedConfig, layers: int) -> int:
    """Elements a token that attention keeps less where all texts have one length, over all layers.

    Grouped heads of whole texts go to cuDNN's attention, others to FlashAttention-2 (`kernels/attention.py`, which says
    of which sizes). With the former each layer was measured to keep one number less for each of a query's: 28 layers of
    16 heads of 128 took 3.74 GiB less for 32,768 tokens, of which that is 3.50. Layers with a window do not.
    """
    own: Any = config.get_text_config()
    heads, groups = (getattr(own, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if not isinstance(heads, int) or not isinstance(groups, int) or heads == groups:
        return 0
    size = getattr(own, "head_dim", None) or own.hidden_size // heads
    kinds = getattr(own, "layer_types", None)
    windowed = not kinds and getattr(own, "sliding_window", None) is not None
    whole = 0 if windowed else list(kinds).count("full_attention") if kinds else layers
    return int(whole * heads * size) if 32 < size <= 128 and size % 8 == 0 else 0
