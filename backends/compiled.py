"""The compiled backend: each repeated layer compiled, on any device that torch's compiler serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.contracts import BackendSpec, Needs, Step, StepContext
from ..core.hookspecs import hookimpl
from .regions import regions_of


def build_step(context: StepContext) -> Step:
    """Sentence Transformers' step with the model's layers compiled and its LoRA layers joined."""
    regions = regions_of(context)

    def step(model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        with regions.active():
            return context.eager(model, batch, items)

    return step


@hookimpl
def burnish_register_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(
            name="compiled", summary="each layer compiled by torch.inductor, LoRA without its traffic",
            build_step=build_step, needs=Needs(devices=("cuda", "cpu"), packages=("triton",)), priority=-1,
        )
    ]  # fmt: skip
