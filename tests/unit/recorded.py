"""Models of a plugin that is not there, and records of their training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from burnish.core.loading import Decision, decide
from burnish.core.options import LoadOptions
from burnish.core.patching import PatchPlan
from burnish.core.preparation import Preparation
from burnish.core.provenance import Provenance, parse, record

Install = Callable[..., str]
Record = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"

FAMILY = """
@hookimpl
def burnish_register_families():
    return [FamilySpec(name="zeta", model_types=("zeta",), build=lambda config: Family(name="zeta"))]
"""
EVERYTHING = """
from burnish.core.contracts import Packing

@hookimpl
def burnish_register_families():
    return [FamilySpec(name="zeta", model_types=("zeta",), build=lambda config: Family(name="zeta", packing=Packing()))]

@hookimpl
def burnish_register_backends():
    return [BackendSpec(name="zap", summary="", build_step=lambda context: context.eager, priority=5)]

@hookimpl
def burnish_register_kernels():
    return [KernelSpec(operation="packed_attention", name="zip", load=lambda: print, priority=5)]
"""


class Zeta(PretrainedConfig):  # type: ignore[no-untyped-call]
    """A config of a type that Burnish knows nothing of."""

    model_type = "zeta"


class First(nn.Linear):
    """A class to patch."""


class Second(First):
    """What it becomes."""


def decided(**options: Any) -> Decision:
    """What such a model gets with the plugins that are installed now."""
    return decide(LoadOptions(**options), Zeta(dtype="float32"), "cpu")


def model(decision: Decision | None = None, former: Provenance | None = None, plan: Any = None) -> Any:
    """What `record` looks at of a model."""
    decision = decision or decided()
    packed: Any = object() if decision.packed else None
    preparation = Preparation(decision, plan or PatchPlan(()), packed, "mean, not normalised (as given)")
    return SimpleNamespace(burnish=preparation, trained_with=former, transformers_model=None, dtype="torch.float32")


def made(*args: Any, **keywords: Any) -> Record:
    """The record of such a model."""
    found = record(model(*args, **keywords))
    assert found is not None
    return found


def read(found: Record) -> Provenance:
    """A record as it comes back from its file."""
    return parse(json.dumps(found))


def from_zeta(**changes: Any) -> Provenance:
    """The record of a model that was trained with `zeta-plugin` 1.0, with `changes` to the family's part."""
    part = {"name": "zeta", "plugin": "zeta", "distribution": "zeta-plugin", "version": "1.0", **changes}
    return read(made() | {"family": part})


def install_zeta(install: Install, version: str = "1.0", **keywords: Any) -> None:
    plugins = {"zeta": "zeta_plugin"}
    install("zeta-plugin", "model_type.zeta", code=FAMILY, version=version, plugins=plugins, **keywords)
