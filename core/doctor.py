"""What is installed and what a model would get: the reasons behind every choice, without loading weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .choices import Considered
from .contracts import BackendSpec, CommandSpec, ExporterSpec, FamilySpec, KernelSpec
from .discovery import Plugin, find, installed
from .loading import CLASSIFY, EMBED, Decision, Repository, decide, read_repository, skeleton, task_of
from .options import LoadOptions, Purpose
from .patching import PatchPlan
from .registry import Failure, Registry, registry
from .settings import disabled_plugins, set_disabled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sections = list[tuple[str, list[tuple[str, str]]]]

# What a plugin may register, by the kind it claims in its metadata: (hook, value, word for the table).
_OFFERS: dict[str, tuple[str, type[Any], str]] = {
    "model_type": ("burnish_register_families", FamilySpec, "family"),
    "fallback": ("burnish_register_families", FamilySpec, "family"),
    "backend": ("burnish_register_backends", BackendSpec, "backend"),
    "operation": ("burnish_register_kernels", KernelSpec, "kernel"),
    "exporter": ("burnish_register_exporters", ExporterSpec, "exporter"),
    "command": ("burnish_register_commands", CommandSpec, "command"),
}


def plugin_rows(*, check: bool = False) -> tuple[list[tuple[str, ...]], bool]:
    """(plugin, provides, distribution, version, contract, health) for every plugin, and whether any is broken.

    Args:
        check: Import each plugin that is on and ask it everything it claims; otherwise nothing is imported.
    """
    plugins = registry()
    rows: list[tuple[str, ...]] = []
    broken = False
    for plugin in plugins.plugins:
        health = plugin.state if plugin.state == "on" else f"{plugin.state}: {plugin.reason}"
        if plugin.state == "on" and check and (failure := _ask_all(plugins, plugin)):
            health, broken = f"broken: {failure.reason} {failure.tail}".rstrip(), True
        elif plugin.state == "on" and check:
            health = "healthy"
        broken = broken or plugin.state == "refused"
        contract = ", ".join(plugin.values("contract"))
        rows.append((plugin.name, _provides(plugin), plugin.distribution, plugin.version, contract, health))
    return rows, broken


def _provides(plugin: Plugin) -> str:
    words = {
        "model_type": "family for",
        "fallback": "fallback",
        "backend": "backend",
        "operation": "kernel",
        "observer": "observer",
    }
    parts = [
        f"{words.get(kind, kind)} {', '.join(plugin.values(kind))}"
        for kind in ("model_type", "fallback", "backend", "operation", "exporter", "command", "observer")
        if plugin.values(kind)
    ]
    return "; ".join(parts) or "nothing declared"


def _ask_all(plugins: Registry, plugin: Plugin) -> Failure | None:
    if failure := plugins.load(plugin):
        return failure
    for kind, (hook, spec, _) in _OFFERS.items():
        if plugin.values(kind) and isinstance(answer := plugins.ask(plugin, hook, spec), Failure):
            return answer
    return None


def switch(name: str, *, on: bool) -> str:
    """Switch a plugin (or a whole distribution) on or off for good; returns what was done, as a sentence.

    Raises:
        PluginError: If nothing of that name is installed; one that was disabled and then uninstalled can be enabled.
    """
    before = disabled_plugins()
    if not (on and name in before):
        find(installed(), name)
    after = before - {name} if on else before | {name}
    if after == before:
        return f"{name} is {'enabled' if on else 'disabled'} already"
    return f"{name} is {'enabled' if on else 'disabled'} ({set_disabled(after)})"


def explain(
    model: str,
    *,
    device: str | None = None,
    backend: str = "auto",
    full_finetuning: bool = False,
    plugins: Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> Sections:
    """Every choice for a model with its reason, in sections of (what, value). Reads configs, no weights.

    Raises:
        BurnishError: Where loading the model for training would raise too.
    """
    from sentence_transformers.util import get_device_name

    purpose: Purpose = "full" if full_finetuning else "adapters"
    named = None if plugins is None else tuple(plugins)
    options = LoadOptions(purpose=purpose, backend=backend, plugins=named, quiet=True)
    repository = read_repository(model, trust_remote_code=trust_remote_code, plugins=named)
    task = task_of(repository)
    decision = decide(options, repository.config, device or get_device_name(), base=repository.base, task=task)
    transformer = skeleton(repository, decision.task, trust_remote_code)
    left = [("-", line) for line in decision.family.family.leaves]
    return [
        ("Model", _model_rows(repository)),
        ("Family", [*_family_rows(decision), _reading(decision, repository)]),
        ("Weights and input", _weight_rows(decision)),
        ("Backend", _backend_rows(decision)),
        ("Patches", _patch_rows(decision, transformer)),
        ("LoRA", _lora_rows(decision, transformer)),
        ("Left on the table", left or [("-", "nothing that the family knows of")]),
    ]


def _model_rows(repository: Repository) -> list[tuple[str, str]]:
    rows = [("name", repository.name), ("model type", repository.config.model_type)]
    if repository.base:
        rows.append(("adapter over", repository.base))
    is_st = "modules.json" in repository.files
    layout = "Sentence Transformers folder" if is_st else "bare transformer (no modules.json)"
    return [*rows, ("layout", layout)]


def _considered(items: Iterable[Considered]) -> list[tuple[str, str]]:
    return [(item.verdict, f"{item.name} of {item.plugin.label}: {item.reason}") for item in items]


def _family_rows(decision: Decision) -> list[tuple[str, str]]:
    choice = decision.family
    return [
        ("chosen", f"{choice.family.name} of {choice.plugin.label}: {choice.reason}"),
        *_considered(choice.considered),
    ]


def _reading(decision: Decision, repository: Repository) -> tuple[str, str]:
    """How token vectors become an embedding, or what a task head reads of them."""
    if decision.task == EMBED:
        return "pooling", _pooling(decision, repository)
    head = decision.head
    if head is None:
        return "head", f"{decision.task}; the family does not say what it reads, so input is padded"
    words = {"every": "every token", "mean": "the mean of the tokens"}
    return "head", f"{decision.task}, reads {words.get(head.reads, f'the {head.reads} token')}"


def _pooling(decision: Decision, repository: Repository) -> str:
    if "modules.json" in repository.files:
        return "as modules.json says, exactly"
    rule = decision.family.pooling(repository.config, repository.files)
    normal = "normalised" if rule.normalize else "not normalised"
    return f"{rule.mode}, {normal} (default of family {decision.family.family.name})"


def _weight_rows(decision: Decision) -> list[tuple[str, str]]:
    machine = decision.machine
    capability = f", compute capability {machine.compute_capability}" if machine.compute_capability else ""
    rows = [("device", f"{machine.device}{capability}"), ("weights", str(decision.precision))]
    rows += [("never in", f"{dtype}: {why}") for dtype, why in decision.family.family.precision.refused.items()]
    return [*rows, ("input", f"{'packed' if decision.packed else 'padded'}: {decision.packed_reason}")]


def _backend_rows(decision: Decision) -> list[tuple[str, str]]:
    choice = decision.backend
    rows = [
        ("chosen", f"{choice.spec.name} of {choice.plugin.label}: {choice.reason}"),
        *_considered(choice.considered),
    ]
    if decision.attention is not None:
        kernel = decision.attention
        rows.append(("kernel", f"packed_attention: {kernel.spec.name} of {kernel.plugin.label}"))
    return rows


def _patch_rows(decision: Decision, transformer: PreTrainedModel) -> list[tuple[str, str]]:
    plan = PatchPlan(decision.family.claims(transformer, decision.machine))
    rows = [(path, f"{patch}: {why}") for path, patch, _, why in plan.rows()]
    return rows or [("-", "none: transformers' modules as they are")]


def _lora_rows(decision: Decision, transformer: PreTrainedModel) -> list[tuple[str, str]]:
    from .adapters import lora_layers
    from .heads import head_modules, within  # imports torch, which listing plugins does without

    head = head_modules(transformer, decision.head) if decision.task != EMBED else []
    layers, dead = lora_layers(transformer, decision.family.family.lora)
    layers, dead = ([name for name in found if not within(name, head)] for found in (layers, dead))
    rows = [
        ("layers", f"{len(layers)} linear layers: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in layers}))}")
    ]
    if head:
        kept = "trained and saved in full" if decision.task == CLASSIFY else "stays as it is"
        rows.append(("head", f"{', '.join(head)}: {kept}"))
    return [*rows, *(("left out", f"{name}: nothing reads its output") for name in dead)]
