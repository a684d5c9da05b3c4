"""The helpers for padded batches that transformers imports from flash-attn."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(states: Tensor, indices: Tensor) -> Tensor:
    """Rows of `states` (tokens, …)."""
    return states[indices]


def unpad_input(
    hidden: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(tokens, …) of a padded (batch, length, …), their indices, where texts begin, the longest, and the lengths."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(hidden: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """(tokens, …) back to (batch, length, …), zeros between."""
    padded = hidden.new_zeros(batch * length, *hidden.shape[1:])
    padded[indices] = hidden
    return padded.view(batch, length, *hidden.shape[1:])
