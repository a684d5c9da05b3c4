"""A backend for Burnish that names the module in which a number stops being one, in the forward or the backward pass.

Each step is Sentence Transformers' own, untouched. One number is read at its end: the largest of the loss and of all
gradients. Only where that is not finite is the step run once more, from the same random numbers and with hooks on every
module, and the run ends with the name of the first module at fault. Nothing of it is left on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from burnish.core.contracts import BackendSpec, Step, StepContext
from burnish.core.errors import ModelError
from burnish.core.hookspecs import hookimpl
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def build_step(context: StepContext) -> Step:
    """Sentence Transformers' step, watched."""
    # Under float16 autocast, gradients that are not finite are how the loss scaler finds its scale.
    scaled = bool(context.arguments.fp16)

    def step(model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        def run() -> Tensor:
            return context.eager(model, dict(batch), items)

        before = _random_numbers(context.machine.device)
        loss = run()
        if _all_finite([loss], () if scaled else model.parameters()):
            return loss
        model.zero_grad()
        for source, state in before:
            source.set_rng_state(state)
        raise find_fault(context.model, run)

    return step


def _random_numbers(device: str) -> list[tuple[Any, Tensor]]:
    """The generators that a step may draw from, with their states: on the host, so no device is waited for."""
    sources = [torch] if device == "cpu" else [torch, torch.get_device_module(device)]
    return [(source, source.get_rng_state()) for source in sources]


def _all_finite(tensors: Iterable[Tensor], parameters: Iterable[nn.Parameter] = ()) -> bool:
    """Whether all of them, and the gradients of all parameters, are finite: one number is read from the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The largest absolute value, since a sum of squares overflows where no value does.
    return math.isfinite(get_total_norm([*tensors, *gradients], norm_type=math.inf).item())


def find_fault(model: nn.Module, run: Callable[[], Tensor]) -> ModelError:
    """Run a step under watch, and say what is wrong with it; the model has no hooks and no gradients afterwards.

    Args:
        model: Whose modules are watched.
        run: The step; returns the loss, ().
    """
    watches = [Watch(name or "the whole model", module) for name, module in model.named_modules()]
    try:
        loss = run()
    except NotFinite as found:
        return ModelError(found.what, where=f"module {found.module}", fix=found.fix)
    finally:
        for watch in watches:
            watch.remove()
        model.zero_grad()
    if not _all_finite([loss]) or any(watch.spoiled for watch in watches):
        what = "it or its gradient is not finite, while the output of every module is"
        return ModelError(what, where="the loss", fix="Look at its parameters and at the labels")
    what = "the loss or a gradient was not finite, and is when the step is run again"
    return ModelError(what, where="this step", fix="It is not deterministic, or gradients overflow as they add up")


class NotFinite(Exception):
    """The first fault of a step; ends it."""

    def __init__(self, module: str, what: str, fix: str) -> None:
        super().__init__(module, what)
        self.module, self.what, self.fix = module, what, fix


class Watch:
    """Hooks on one module that end a step with `NotFinite` where this module is the first that is at fault.

    `spoiled` says whether a gradient that is not finite came to an output of it: then the fault lies after it.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.spoiled = name, False
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True),
        ]
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                hooked: Any = parameter
                self._handles.append(hooked.register_hook(self._judge(part)))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Each input becomes a view of its own, whose gradient is what this module alone hands back."""
        return _views((args, kwargs), self._judge("input"))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for tensor in _tensors(output):
            if not _all_finite([tensor]):
                raise NotFinite(self.name, *_forward_fault(module, tensor.dtype))
        return _views(output, self._note)

    def _note(self, gradient: Tensor) -> None:
        self.spoiled = self.spoiled or not _all_finite([gradient])

    def _judge(self, part: str) -> Callable[[Tensor], None]:
        def judge(gradient: Tensor) -> None:
            if not self.spoiled and not _all_finite([gradient]):
                what = f"the gradient of its {part} is not finite in the backward pass, while that of its output is"
                raise NotFinite(self.name, what, _too_narrow(gradient.dtype))

        return judge


def _forward_fault(module: nn.Module, dtype: torch.dtype) -> tuple[str, str]:
    """(what, fix) for a module whose output is the first that is not finite."""
    what = "its output is not finite in the forward pass"
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.is_floating_point() and not _all_finite([parameter.detach()]):
            return f"{what}, since its {part} is not", "Load the weights again, or lower the learning rate"
    return f"{what}, while its inputs and weights are", _too_narrow(dtype)


def _too_narrow(dtype: torch.dtype) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        return f'It runs in {dtype}: load the model with dtype="float32"'
    return "Look at this batch, and at what the module computes"


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating dtype in what a module takes or returns; an empty one is finite."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value.detach()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _views(value: Any, hook: Callable[[Tensor], None]) -> Any:
    """The same value, with a view in place of each tensor that will get a gradient, and `hook` on that gradient."""
    if isinstance(value, Tensor):
        if not (value.requires_grad and value.numel()):
            return value
        view: Any = value.view_as(value)
        view.register_hook(hook)
        return view
    if isinstance(value, dict):  # changed where it is: modules of Sentence Transformers hand one dict on
        for name, part in list(value.items()):
            value[name] = _views(part, hook)
    elif type(value) in (list, tuple):
        return type(value)(_views(part, hook) for part in value)
    return value


@hookimpl
def burnish_register_backends() -> list[BackendSpec]:
    """What this plugin offers; pyproject.toml claims the same."""
    summary = "Sentence Transformers' step; names the module where a number stops being finite"
    # Below the reference's 0: it runs where it is asked for by name, and never because it is installed.
    return [BackendSpec(name="watchful", summary=summary, build_step=build_step, priority=-1)]
