"""Gradient checkpointing: transformers' own, after the family's fix where one is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contracts import Family
from .errors import ModelError
from .options import Checkpointing

if TYPE_CHECKING:
    from torch.utils.checkpoint import CheckpointPolicy
    from transformers import PreTrainedModel

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def enable_checkpointing(
    model: PreTrainedModel,
    option: Checkpointing,
    family: Family,
    *,
    every_n_layers: int = 1,
    torch_keywords: Mapping[str, Any] | None = None,
) -> str:
    """Switch checkpointing on as asked; returns what was done, in words.

    "selective" computes what is cheap again, and keeps matrix products and attention. "offload" keeps the checkpoints
    in host memory. On a CPU they are there already, so plain checkpointing is what it means there, and the returned
    text says so.

    Args:
        model: The transformer.
        option: False, True, "selective" or "offload".
        family: What its plugin says about it.
        every_n_layers: Checkpoint every layer, every second, …
        torch_keywords: For `torch.utils.checkpoint.checkpoint`; without re-entrance unless they ask for it.

    Raises:
        ModelError: If neither transformers nor the family has checkpointing for this architecture.
    """
    if option is False:
        return "off"
    check_checkpointing(model, family)
    if not model.supports_gradient_checkpointing:
        model.supports_gradient_checkpointing = True  # on this instance, whose layers the family has made fit for it
    on_host = model.device.type == "cpu"
    if option == "selective":
        torch_keywords = {**(torch_keywords or {}), "context_fn": _selective}
    keywords: dict[str, Any] = {"every_n_layers": every_n_layers, "offload": option == "offload" and not on_host}
    # transformers 5.18 renamed the method; the old name warns there and the new one is missing before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **(torch_keywords or {})}, **keywords)
    layers = "every layer" if every_n_layers == 1 else f"one layer of {every_n_layers}"
    if option == "offload":
        return f"{layers} (offload has nothing to do on a CPU)" if on_host else f"{layers}, kept in host memory"
    return f"{layers}, but for products and attention" if option == "selective" else layers


def _selective() -> tuple[Any, Any]:
    """Contexts in which a checkpoint keeps what is costly (PyTorch's selective activation checkpointing)."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    contexts: Any = create_selective_checkpoint_contexts
    made: tuple[Any, Any] = contexts(_policy)
    return made


def _policy(context: Any, operation: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name().partition("::")[2].partition(".")[0]
    costly = name in _PRODUCTS or ("attention" in name and not name.endswith("backward"))
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def check_checkpointing(model: PreTrainedModel, family: Family, where: str = "use_gradient_checkpointing") -> None:
    """Refuse what Sentence Transformers would leave out with a line in the log.

    Raises:
        ModelError: If neither transformers nor the family has checkpointing for this architecture.
    """
    if not getattr(model, "supports_gradient_checkpointing", False) and family.checkpointing is None:
        name = type(model).__name__
        what = f"transformers has no gradient checkpointing for {name}, and family {family.name} brings none"
        raise ModelError(what, where=where, fix=f"Pass {where}=False")


def disable_checkpointing(model: PreTrainedModel) -> str:
    """Switch checkpointing off; returns "off"."""
    if model.supports_gradient_checkpointing:
        model._set_gradient_checkpointing(enable=False)
    vars(model).pop("supports_gradient_checkpointing", None)
    return "off"
