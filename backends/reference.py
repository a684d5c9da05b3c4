"""The reference backend: Sentence Transformers' own step on any device, and a plain version of every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..core.contracts import BackendSpec, KernelSpec, Needs, Step, StepContext
from ..core.hookspecs import hookimpl


def build_step(context: StepContext) -> Step:
    """Sentence Transformers' step as it is: what every other backend is compared with."""
    if context.activation_budget is not None:
        from .budgeted import BudgetedStep

        return BudgetedStep(context)
    return context.eager


def _attention() -> Callable[..., Any]:
    from ..kernels.attention import packed_attention

    return packed_attention


def _flash_attention() -> Callable[..., Any]:
    from ..kernels.attention import flash_packed_attention

    return flash_packed_attention


def _tiled_infonce() -> Callable[..., Any]:
    from ..kernels.infonce import tiled_infonce

    return tiled_infonce


def _rounded_adamw() -> Callable[..., Any]:
    from ..kernels.adamw import rounded_adamw

    return rounded_adamw


def _rounded_adamw_tiles() -> Callable[..., Any]:
    from ..kernels.adamw_tiles import rounded_adamw

    return rounded_adamw


def _gather_rows() -> Callable[..., Any]:
    from ..kernels.rows import gather_rows

    return gather_rows


def _triton_gather_rows() -> Callable[..., Any]:
    from ..kernels.rows import triton_gather_rows

    return triton_gather_rows


@hookimpl
def burnish_register_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(name="reference", summary="plain PyTorch, one kernel at a time, any device", build_step=build_step)
    ]


@hookimpl
def burnish_register_kernels() -> Iterable[KernelSpec]:
    return [
        KernelSpec(operation="packed_attention", name="reference", load=_attention),
        KernelSpec(
            operation="packed_attention", name="flash", load=_flash_attention, priority=10,
            needs=Needs(devices=("cuda",), compute_capability=(8, 0)),
        ),
        KernelSpec(operation="tiled_infonce", name="reference", load=_tiled_infonce),
        KernelSpec(operation="gather_rows", name="reference", load=_gather_rows),
        KernelSpec(
            operation="gather_rows", name="triton", load=_triton_gather_rows, priority=10,
            needs=Needs(devices=("cuda",), compute_capability=(7, 0), packages=("triton",)),
        ),
        KernelSpec(operation="rounded_adamw", name="reference", load=_rounded_adamw),
        KernelSpec(
            operation="rounded_adamw", name="triton", load=_rounded_adamw_tiles, priority=10,
            needs=Needs(devices=("cuda",), compute_capability=(8, 0), packages=("triton",)),
        ),
    ]  # fmt: skip
