"""Checks of a backend: its step is Sentence Transformers' own, for every family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..contracts import FamilySpec
from ..registry import Failure, registry
from .find import sample_config
from .subject import Subject
from .training import trainer


def model_types() -> list[str]:
    """The model types of Burnish's own families that have a sample config."""
    known = registry(())
    found = []
    for plugin in known.claimants("model_type"):
        answer = known.ask(plugin, "burnish_register_families", FamilySpec)
        if not isinstance(answer, Failure):
            found += [name for spec in answer if spec.sample is not None for name in spec.model_types]
    return sorted(found)


def check_step(
    backend: str, model_type: str, folder: Path, *, plugins: Sequence[str] | None = None, tolerance: float = 1e-5
) -> str:
    """Four steps of a tiny model by this backend have plain Sentence Transformers' losses and weights.

    Raises:
        AssertionError: If not, or if another backend ran.
    """
    named = None if plugins is None else tuple(plugins)
    subject = Subject(
        config=sample_config(model_type), folder=folder, tolerance=tolerance, backend=backend, plugins=named
    )
    chosen = subject.ours().burnish.decision.backend.spec.name
    assert chosen == backend, f"the backend {chosen} runs in place of {backend}"
    return trainer(subject)
