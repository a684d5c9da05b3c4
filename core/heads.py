"""Where a task head reads a packed batch, and which modules it consists of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .contracts import Head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def read_vectors(head: Head, hidden: Tensor, cu_seqlens: Tensor, passed_over: Tensor | None = None) -> Tensor:
    """What a head reads of each packed text; `head.logits` makes logits of it. A mean is added up in float32 or better.

    Args:
        head: First token, last token, mean, or every token.
        hidden: (T, H) token vectors of the whole batch.
        cu_seqlens: (N + 1,) integer, the first token of each text, and T at the end. No text may be empty.
        passed_over: (T,) boolean, tokens that are not taken for a text's last one; a text that has no other is read at
            its first. transformers' classification heads on decoders pass over padding tokens, whoever put them there.

    Returns:
        (N, H); for "every", (T, H).
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if head.reads == "every":
        return hidden
    if head.reads == "mean":
        from .packing import packed_mean

        return packed_mean(hidden, cu_seqlens)
    if head.reads == "first":
        return hidden[starts]
    if passed_over is None:
        return hidden[ends - 1]
    places = torch.arange(hidden.shape[0], device=hidden.device).masked_fill(passed_over, -1)
    return hidden[places.cummax(0).values[ends - 1].maximum(starts)]


def head_modules(transformer: PreTrainedModel, head: Head | None) -> list[str]:
    """Paths of the modules that a model with a task head has for it: those with weights outside of its base model, and
    what the family names inside.

    Args:
        transformer: A model with a head; one without has none.
        head: What the family says about it, or None where it says nothing.
    """
    base = transformer.base_model
    outside = [
        name
        for name, module in transformer.named_children()
        if module is not base and any(True for _ in module.parameters())
    ]
    suffixes = () if head is None or base is transformer else head.inside
    inside = [
        name
        for name, module in transformer.named_modules()
        if name.endswith(tuple(f".{suffix}" for suffix in suffixes)) and any(True for _ in module.parameters())
    ]
    return [*inside, *(outside if base is not transformer else ())]


def within(path: str, parts: Iterable[str]) -> bool:
    """Whether a module is one of `parts` or stands inside of one."""
    return any(f".{part}." in f".{path}." for part in parts)


def fresh_modules(transformer: PreTrainedModel) -> list[str]:
    """Paths of the modules of a model just read, not quantised, whose own weights the checkpoint does not have.

    transformers marks what it has read; what it has not, it has drawn at random. What an adapter brings is read later.
    """
    adapter = (".lora_", ".modules_to_save.", ".original_module")
    return [
        name.removesuffix(".base_layer")
        for name, module in transformer.named_modules()
        if not any(part in name for part in adapter)
        and any(
            parameter.is_floating_point() and not getattr(parameter, "_is_hf_initialized", False)
            for parameter in module.parameters(recurse=False)
        )
    ]
