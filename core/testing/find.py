"""What is examined, found in the registry by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from ..contracts import BackendSpec, FamilySpec, KernelSpec
from ..discovery import Plugin
from ..errors import ConfigError, PluginError
from ..registry import Failure, blame, registry

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


def family_spec(model_type: str, plugins: Sequence[str] | None = None) -> tuple[Plugin, FamilySpec]:
    """The family that claims a model type: of a plugin that is named, else a built-in, else the only one.

    Raises:
        PluginError: If nobody claims it.
    """
    claimants = registry(plugins).claimants("model_type", model_type)
    ranked = sorted(claimants, key=lambda plugin: (not plugin.named, not plugin.own))
    for plugin in ranked[:1]:
        for spec in offers(plugin, "burnish_register_families", FamilySpec, plugins):
            if model_type in spec.model_types:
                return plugin, spec
    known = sorted({value for plugin in registry(plugins).plugins for value in plugin.values("model_type")})
    raise PluginError(f"no plugin that is on takes model type {model_type!r}", fix=f"Known: {', '.join(known)}")


def sample_config(model_type: str, plugins: Sequence[str] | None = None) -> PretrainedConfig:
    """The tiny config that the family of a model type gives for random weights; see `sampled`."""
    return sampled(*family_spec(model_type, plugins))


def sampled(plugin: Plugin, spec: FamilySpec, size: Literal["tiny", "base"] = "tiny") -> PretrainedConfig:
    """The config that a plugin's family gives for random weights.

    Raises:
        ConfigError: If it gives none.
        PluginError: If it raises, or gives something else or one of another model type.
    """
    from transformers import PretrainedConfig

    if spec.sample is None:
        fix = "Give it one: FamilySpec(sample=…), or override `config` in the test"
        raise ConfigError("has no sample config", where=f"family {spec.name} of {plugin.label}", fix=fix)
    with blame(plugin, f"the {size} sample of family {spec.name}"):
        config = spec.sample(size)
        if not isinstance(config, PretrainedConfig):
            raise TypeError(f"it returned a {type(config).__name__}, not a config")
        if config.model_type not in spec.model_types:
            types = " or ".join(spec.model_types)
            raise ValueError(f"its model type is {config.model_type!r}, and the family takes {types}")
    return config
