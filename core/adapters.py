"""LoRA on a loaded model, through PEFT: every parameter acts or raises, and no adapter lands where it is dead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .contracts import LoraTargets
from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .model import SentenceTransformer


def add_lora(model: SentenceTransformer, *, random_state: int, target_modules: Any, lora: dict[str, Any]) -> list[str]:
    """Inject a LoRA adapter into the model's transformer, in place.

    Args:
        model: A model loaded for adapters, without one yet.
        random_state: Seed of the adapter's initial weights; the global generator is left as it was.
        target_modules: Module-path suffixes (or a regular expression, or "all-linear"); None means the family's.
        lora: What goes to `peft.LoraConfig` as it is.

    Returns:
        What was decided on the user's behalf, one line each.

    Raises:
        ModelError: If the model cannot take an adapter now.
        ConfigError: If a target names no module, or PEFT refuses a setting.
    """
    from peft import LoraConfig

    transformer = _check_ready(model)
    assert model.burnish is not None
    family = model.burnish.decision.family.family
    targets, excluded, notes = _targets(transformer, family.lora, target_modules)
    settings = {"task_type": "FEATURE_EXTRACTION", **{key: value for key, value in lora.items() if value is not None}}
    try:
        config = LoraConfig(target_modules=targets, exclude_modules=excluded or None, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            transformer.add_adapter(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses the adapter: {error}", where="get_peft_model") from error
    float32_adapters(transformer)
    return notes


def _check_ready(model: SentenceTransformer) -> PreTrainedModel:
    fix = "Load it with FastSentenceTransformer.from_pretrained(name)"
    if model.burnish is None or model.transformers_model is None:
        raise ModelError("this model was not loaded by Burnish", where="get_peft_model", fix=fix)
    purpose = model.burnish.decision.options.purpose
    if purpose != "adapters":
        flag = "full_finetuning=True" if purpose == "full" else "for_inference=True"
        raise ModelError(f"this model was loaded for {purpose}", where="get_peft_model", fix=f"{fix}, without {flag}")
    if getattr(model.transformers_model, "_hf_peft_config_loaded", False):
        raise ModelError("this model has an adapter already", where="get_peft_model", fix="Train that one, or load the base model")
    return model.transformers_model


def _targets(transformer: PreTrainedModel, default: LoraTargets, asked: Any) -> tuple[Any, list[str], list[str]]:
    """(target_modules, exclude_modules, notes) for PEFT."""
    linear = [name for name, module in transformer.named_modules() if _is_linear(module)]
    dead = [name for name in linear if _named(name, default.exclude)]
    if isinstance(asked, str):  # PEFT's own forms: a regular expression over full names, or "all-linear"
        targets: Any = [name for name in linear if name not in dead] if asked == "all-linear" else asked
        return targets, dead, _dead_note(dead)
    if asked is None:
        names: Sequence[str] = default.names or sorted({name.rsplit(".", 1)[-1] for name in linear if name not in dead})
    else:
        names = list(asked)
    everything = [name for name, _ in transformer.named_modules()]
    for name in names:
        if not any(_named(full, (name,)) for full in everything):
            known = sorted({full.rsplit(".", 1)[-1] for full in linear})
            raise ConfigError(f"no module is called {name!r}", where="target_modules", fix=f"Linear layers here: {', '.join(known)}")
    hit = [name for name in dead if _named(name, names)]
    return list(names), hit, _dead_note(hit)


def lora_layers(transformer: nn.Module, default: LoraTargets) -> tuple[list[str], list[str]]:
    """(the layers a family's default targets adapt, the linear layers it leaves out as dead), by full name."""
    linear = [name for name, module in transformer.named_modules() if _is_linear(module)]
    dead = [name for name in linear if _named(name, default.exclude)]
    return [name for name in linear if name not in dead and (not default.names or _named(name, default.names))], dead


def _dead_note(dead: list[str]) -> list[str]:
    return [f"{name} gets no adapter: nothing reads its output" for name in dead]


def _is_linear(module: nn.Module) -> bool:
    # Quantised layers subclass nn.Linear; GPT-2's kin use Conv1D, a linear layer with transposed weights.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _named(full: str, suffixes: Iterable[str]) -> bool:
    return any(full == suffix or full.endswith(f".{suffix}") for suffix in suffixes)


def float32_adapters(transformer: PreTrainedModel) -> None:
    """Hold trainable adapter weights in float32: a bfloat16 one loses updates smaller than 1/256 of itself."""
    for parameter in transformer.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
