"""PyTorch's own FlashAttention-2 kernels (Dao 2023) under the names that transformers imports from flash-attn.

For the baselines only: `aten::_flash_attention_forward` is the same source, compiled into PyTorch, so "Sentence
Transformers with FlashAttention-2" can be timed where the flash-attn package cannot be built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"

Window = tuple[int | None, int | None]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """Attention over texts laid end to end.

    Args:
        q: (tokens, heads, size), float16 or bfloat16.
        k: (tokens, key heads, size).
        v: As `k`.
        cu_seqlens_q: (texts + 1,) where each text begins, and the end.
        cu_seqlens_k: The same for the keys.
        window_size: How many keys to the left and right are seen; -1 is all.
        unused: `deterministic` and `return_attn_probs`, which training baselines leave at their defaults.

    Returns:
        (tokens, heads, size).
    """
    if softcap or alibi_slopes is not None or block_table is not None or any(unused.values()):
        raise NotImplementedError("the stand-in for flash-attn has no soft cap, ALiBi, block table, or other options")
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    out: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k), dropout_p, causal, False,
        scale=softmax_scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    **unused: Any,
) -> Tensor:
    """The same for texts of one length: (batch, length, heads, size) in and out."""
    batch, length, key_length = q.shape[0], q.shape[1], k.shape[1]
    starts_q, starts_k = (
        torch.arange(0, (batch + 1) * step, step, device=q.device, dtype=torch.int32) for step in (length, key_length)
    )
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts_q, starts_k, length, key_length,
        dropout_p, softmax_scale, causal, window_size, **unused,
    )  # fmt: skip
    return out.view(batch, length, *out.shape[1:])


def flash_attn_with_kvcache(*unused: Any, **keywords: Any) -> Tensor:
    """For generation; training has no cache of keys and values."""
    raise NotImplementedError("the stand-in for flash-attn has no key and value cache")
