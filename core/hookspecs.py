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
    """Offer model families.

    Called when a model is loaded whose type the plugin claims, before its weights are read. Where transformers does not
    know the type, it is called before the config is read too, and makes the type's classes known (with
    `AutoConfig.register` and `AutoModel.register`).

    Returns:
        A `FamilySpec` for each family.

    Claim: `model_type.NAME` for each model type, or `fallback.family`.
    """


@hookspec
def burnish_register_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Offer ways to execute a training step.

    Called when a backend is chosen: at loading, by name or as "auto".

    Returns:
        A `BackendSpec` for each backend.

    Claim: `backend.NAME` for each backend.
    """


@hookspec
def burnish_register_kernels() -> Iterable[KernelSpec]:  # type: ignore[empty-body]
    """Offer implementations of named operations.

    Called when an operation that the plugin claims is needed, at loading; the function itself is imported later, by the
    spec's `load`.

    Returns:
        A `KernelSpec` for each implementation.

    Claim: `operation.NAME` for each operation.
    """


@hookspec
def burnish_register_exporters() -> Iterable[ExporterSpec]:  # type: ignore[empty-body]
    """Offer targets for `burnish export`.

    Called by `burnish export`.

    Returns:
        An `ExporterSpec` for each target.

    Claim: `exporter.TARGET` for each target.
    """


@hookspec
def burnish_register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Offer commands of the `burnish` program.

    Called when the command is typed; the help lists it by its claim, without importing the plugin.

    Returns:
        A `CommandSpec` for each command.

    Claim: `command.NAME` for each command.
    """


@hookspec
def burnish_model_loaded(model: torch.nn.Module) -> None:
    """Observe a model that has just been loaded for training.

    Called at the end of loading, with the patches applied and before an adapter is added. A model loaded for inference
    is not told.

    Args:
        model: The `burnish.SentenceTransformer`. What was chosen for it stands in `model.burnish`.

    Claim: `observer.model_loaded`.
    """


@hookspec
def burnish_step_finished(step: int, logs: dict[str, Any]) -> None:
    """Observe a training run at the steps that are logged.

    Called whenever the trainer logs: every `logging_steps` optimizer steps, after an evaluation, and at the end.

    Args:
        step: Optimizer steps so far.
        logs: What was logged: "loss", "learning_rate", an evaluator's scores, … A copy.

    Claim: `observer.step_finished`.
    """


@hookspec
def burnish_model_saved(model: torch.nn.Module, folder: Path) -> None:
    """Observe a model that has just been saved.

    Called when the folder is whole and in its place: an adapter, a merged model or a full one. Checkpoints of the
    trainer are told too.

    Args:
        model: The model that was saved.
        folder: Where it lies.

    Claim: `observer.model_saved`.
    """
