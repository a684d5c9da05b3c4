"""Where a task head reads a packed batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .contracts import Head

if TYPE_CHECKING:
    from torch import Tensor


def read_vectors(head: Head, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What a head reads of each packed text; `head.logits` makes logits of it.

    Args:
        head: First token, last token, mean, or every token.
        hidden: (T, H) token vectors of the whole batch.
        cu_seqlens: (N + 1,) integer, the first token of each text, and T at the end. No text may be empty.

    Returns:
        (N, H); for "every", (T, H).
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if head.reads == "every":
        return hidden
    if head.reads == "mean":
        texts = torch.repeat_interleave(ends - starts, output_size=hidden.shape[0])
        total = hidden.new_zeros(starts.numel(), hidden.shape[1]).index_add(0, texts, hidden)
        return total / (ends - starts)[:, None]
    return hidden[starts if head.reads == "first" else ends - 1]
