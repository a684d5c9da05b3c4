"""Every hook a plugin may answer. All are optional; each returns values or observes, none changes core."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from .contracts import BackendSpec, CommandSpec, ExporterSpec, FamilySpec, KernelSpec

if TYPE_CHECKING:
    import torch

hookspec = pluggy.HookspecMarker("burnish")
hookimpl = pluggy.HookimplMarker("burnish")


@hookspec
def burnish_register_families() -> Iterable[FamilySpec]:  # type: ignore[empty-body]
    """Offer model families. Claim each model type in the metadata too (`model_type.NAME`)."""


@hookspec
def burnish_register_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Offer ways to execute a training step. Metadata: `backend.NAME`."""


@hookspec
def burnish_register_kernels() -> Iterable[KernelSpec]:  # type: ignore[empty-body]
    """Offer implementations of named operations. Metadata: `operation.NAME`."""


@hookspec
def burnish_register_exporters() -> Iterable[ExporterSpec]:  # type: ignore[empty-body]
    """Offer targets for `burnish export`. Metadata: `exporter.TARGET`."""


@hookspec
def burnish_register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Offer commands of the `burnish` program. Metadata: `command.NAME`."""


@hookspec
def burnish_model_loaded(model: torch.nn.Module) -> None:
    """Observe a model that has just been loaded for training. Metadata: `observer.model_loaded`."""


@hookspec
def burnish_step_finished(step: int, logs: dict[str, Any]) -> None:
    """Observe an optimizer step, with whatever was logged at it. Metadata: `observer.step_finished`."""


@hookspec
def burnish_model_saved(model: torch.nn.Module, folder: Path) -> None:
    """Observe a model that has just been saved to `folder`. Metadata: `observer.model_saved`."""
