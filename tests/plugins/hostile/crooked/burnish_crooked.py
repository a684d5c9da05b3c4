"""A backend and a kernel that run, and return something else than they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from burnish.core.contracts import BackendSpec, KernelSpec, StepContext
from burnish.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def build_step(context: StepContext) -> Any:
    return lambda model, batch, items: float(context.eager(model, batch, items))


def load() -> Callable[..., Tensor]:
    from burnish.kernels.attention import packed_attention

    def attention(*states: Any, **options: Any) -> Tensor:
        return packed_attention(*states, **options).transpose(0, 1)  # heads before tokens: as many numbers

    return attention


@hookimpl
def burnish_register_backends() -> list[BackendSpec]:
    return [BackendSpec(name="crooked", summary="returns a number", build_step=build_step, priority=-1)]


@hookimpl
def burnish_register_kernels() -> list[KernelSpec]:
    return [KernelSpec(operation="packed_attention", name="crooked", load=load, priority=-1)]
