"""What is examined, found in the registry by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ..contracts import BackendSpec, FamilySpec, KernelSpec
from ..discovery import Plugin
from ..errors import ConfigError, PluginError
from ..registry import Failure, registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Spec = TypeVar("Spec", FamilySpec, BackendSpec, KernelSpec)


def offers(plugin: Plugin, hook: str, kind: type[Spec], plugins: Sequence[str] | None) -> tuple[Spec, ...]:
    """What a plugin offers of one kind.

    Raises:
        PluginError: If it is off, refused or broken.
    """
    answer = registry(plugins).ask(plugin, hook, kind)
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


def family_spec(model_type: str, plugins: Sequence[str] | None = None) -> FamilySpec:
    """The family that claims a model type: of a plugin that is named, else a built-in, else the only one.

    Raises:
        PluginError: If nobody claims it.
    """
    claimants = registry(plugins).claimants("model_type", model_type)
    ranked = sorted(claimants, key=lambda plugin: (not plugin.named, not plugin.own))
    for plugin in ranked[:1]:
        for spec in offers(plugin, "burnish_register_families", FamilySpec, plugins):
            if model_type in spec.model_types:
                return spec
    known = sorted({value for plugin in registry(plugins).plugins for value in plugin.values("model_type")})
    raise PluginError(f"no plugin that is on takes model type {model_type!r}", fix=f"Known: {', '.join(known)}")


def sample_config(
    model_type: str, plugins: Sequence[str] | None = None, spec: FamilySpec | None = None
) -> PretrainedConfig:
    """The tiny config that a family gives for random weights.

    Raises:
        ConfigError: If it gives none, or one of another type.
    """
    spec = spec or family_spec(model_type, plugins)
    where = f"family {spec.name}"
    if spec.sample is None:
        fix = "Give it one: FamilySpec(sample=…), or override `config` in the test"
        raise ConfigError("has no sample config", where=where, fix=fix)
    config = spec.sample("tiny")
    if config.model_type not in spec.model_types:
        what = f"its sample config has the model type {config.model_type!r}, which it does not take"
        raise ConfigError(what, where=where, fix=f"Return one of {', '.join(spec.model_types)}")
    return config
