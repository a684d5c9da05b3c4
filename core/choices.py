"""What was chosen, with its reasons; a plugin's own functions are called through these, so that its faults name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .contracts import BackendSpec, Family, KernelSpec, Machine, Patch, Pooling, Step, StepContext
from .discovery import Plugin
from .patching import Claim
from .registry import blame

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """One candidate of a choice: `verdict` is "chosen", "passed over" or "failed"."""

    name: str
    plugin: Plugin
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyChoice:
    """The family for a model, who offers it, and who else might have."""

    family: Family
    plugin: Plugin
    reason: str
    considered: tuple[Considered, ...] = ()

    def pooling(self, config: PretrainedConfig, files: frozenset[str]) -> Pooling:
        """The family's default pooling; see `Family.default_pooling`."""
        with blame(self.plugin, f"the pooling rule of family {self.family.name}"):
            rule = self.family.default_pooling(config, files)
            if not isinstance(rule, Pooling):
                raise TypeError(f"it returned a {type(rule).__name__}, not a Pooling")
        return rule

    def claims(self, model: PreTrainedModel, machine: Machine, *, checkpointing: bool = False) -> list[Claim]:
        """The family's patches for a loaded (or meta) transformer, with the plugin's name on each."""
        rules = [self.family.patches]
        if checkpointing and self.family.checkpointing is not None:
            rules.append(self.family.checkpointing)
        with blame(self.plugin, f"the patch rule of family {self.family.name}"):
            patches = [patch for rule in rules for patch in rule(model, machine)]
            if odd := [patch for patch in patches if not isinstance(patch, Patch)]:
                raise TypeError(f"it returned a {type(odd[0]).__name__} among its Patches")
        return [Claim(owner=self.plugin.label, patch=patch) for patch in patches]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """The backend for a run."""

    spec: BackendSpec
    plugin: Plugin
    reason: str
    considered: tuple[Considered, ...] = ()

    def build_step(self, context: StepContext) -> Step:
        """The backend's training step for a model."""
        with blame(self.plugin, f"building the step of backend {self.spec.name}"):
            step = self.spec.build_step(context)
            if not callable(step):
                raise TypeError(f"it returned a {type(step).__name__}, not a step to call")
        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The implementation of one operation."""

    spec: KernelSpec
    plugin: Plugin

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        with blame(self.plugin, f"loading kernel {self.spec.name} of {self.spec.operation}"):
            function = self.spec.load()
            if not callable(function):
                raise TypeError(f"it returned a {type(function).__name__}, not a function")
        return function
