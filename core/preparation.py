"""What is done to a loaded model before training: patches, packed input, checkpointing, dtypes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

from .adapters import wake_adapters
from .checkpointing import check_checkpointing, disable_checkpointing, enable_checkpointing
from .loading import EMBED, Decision
from .options import Checkpointing
from .packing import PackedInput, pack_inputs, register_attention
from .patching import PatchPlan
from .quantised import settle
from .tables import store_tables

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Preparation:
    """What Burnish did to a model, kept on it as `model.burnish`; print it to read it.

    Args:
        decision: Family, dtype, backend and input layout, with reasons.
        plan: The patches, with what became of each.
        packed: Packed input, or None where the input stays padded.
        pooling: Where the pooling came from; of a model with a task head, what the head reads.
        notes: Further (what, how) rows: prompts, chat template, layers after the pooling.
        checkpointing: What gradient checkpointing does, or "off".
        recompute: What was asked of it.
        embeddings: How the embedding tables are stored, or nothing where they are as they were read.
    """

    decision: Decision
    plan: PatchPlan
    packed: PackedInput | None
    pooling: str
    checkpointing: str = "off"
    recompute: Checkpointing = False
    embeddings: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """(what, what was chosen and why), for tables."""
        family, backend = self.decision.family, self.decision.backend
        applied = len(self.plan.applied)
        return [
            ("family", f"{family.family.name} ({family.plugin.label}; {family.reason})"),
            ("weights", str(self.decision.precision)),
            *([("embeddings", self.embeddings)] if self.embeddings else []),
            ("pooling" if self.decision.task == EMBED else "head", self.pooling),
            *self.notes,
            ("input", f"{'packed' if self.packed else 'padded'} ({self.decision.packed_reason})"),
            ("backend", f"{backend.spec.name} ({backend.reason})"),
            ("patches", f"{applied} applied, {len(self.plan.entries) - applied} not" if self.plan.entries else "none"),
            ("checkpoints", self.checkpointing),
            *(("left to gain", line) for line in family.family.leaves),
        ]

    def __str__(self) -> str:
        return "\n".join(f"  {name:12} {value}" for name, value in self.rows())


def prepare(module: Any, transformer: PreTrainedModel, decision: Decision) -> Preparation:
    """Carry a decision out on a loaded model; for inference that is nothing.

    Args:
        module: The model's first module.
        transformer: The transformer in it.
        decision: From `loading.decide`.
    """
    options, family = decision.options, decision.family.family
    preparation = Preparation(decision, PatchPlan(()), None, "")
    if options.purpose == "inference":
        return preparation
    preparation.plan = _patch(transformer, decision, checkpointing=bool(options.checkpointing))
    if decision.packed and family.packing is not None:
        preparation.packed = pack_inputs(module, family.packing, attention_name(decision))
    preparation.recompute = options.checkpointing
    preparation.checkpointing = enable_checkpointing(transformer, options.checkpointing, family)
    if options.activation_budget_gb is not None:
        preparation.checkpointing = f"as many layers as {options.activation_budget_gb:g} GB do not hold"
    _keep_float32(transformer, family.precision.keep_float32)
    preparation.notes += [("storage", line) for line in settle(transformer, decision.precision)]
    preparation.embeddings = store_tables(transformer, decision)
    wake_adapters(transformer)
    return preparation


def set_checkpointing(
    preparation: Preparation, transformer: PreTrainedModel, option: Checkpointing, where: str, **settings: Any
) -> None:
    """Switch checkpointing over to `option`, with the family's fix for it where there is one.

    Args:
        preparation: What was done to the model so far; it is brought up to date.
        transformer: The model's transformer.
        option: False, True, "selective" or "offload".
        where: The parameter that asked for it, for the error.
        **settings: `every_n_layers` and `torch_keywords` of `enable_checkpointing`.

    Raises:
        ModelError: If this architecture has no checkpointing.
    """
    decision = preparation.decision
    if option is not False:
        check_checkpointing(transformer, decision.family.family, where)
        if decision.family.family.checkpointing is not None:
            preparation.plan.undo()
            preparation.plan = _patch(transformer, decision, checkpointing=True)
    disable_checkpointing(transformer)
    preparation.recompute = option
    preparation.checkpointing = enable_checkpointing(transformer, option, decision.family.family, **settings)


def _patch(transformer: PreTrainedModel, decision: Decision, *, checkpointing: bool) -> PatchPlan:
    plan = PatchPlan(decision.family.claims(transformer, decision.machine, checkpointing=checkpointing))
    plan.apply(transformer)
    return plan


def attention_name(decision: Decision) -> str:
    """The name under which transformers knows the chosen attention; made known if it is not yet."""
    if decision.attention is None:
        return ""
    kernel = decision.attention
    return register_attention(kernel.spec.name, kernel.load(), f"kernel {kernel.spec.name} of {kernel.plugin.label}")


def _keep_float32(transformer: PreTrainedModel, suffixes: tuple[str, ...]) -> None:
    for name, module in transformer.named_modules():
        if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes):
            module.to(torch.float32)


def describe_pooling(model: nn.Module, source: str) -> str:
    """The model's pooling in words, with where it came from."""
    modules = OrderedDict(model.named_children()).values()
    mode = next((module.pooling_mode for module in modules if isinstance(module, PoolingModule)), "none")
    normal = "normalised" if any(isinstance(module, Normalize) for module in modules) else "not normalised"
    return f"{mode}, {normal} ({source})"
