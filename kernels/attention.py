"""Attention over packed texts: several texts in one row of tokens, each attending only to itself.

T: tokens of all texts, H: query heads, G: key/value heads (H a multiple of G), D: head size, N: texts, L: longest text.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from .light_dropout import SOURCE
from .lora import compute_dtype

# Triton has wheels for Linux alone.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention inside each text (Vaswani et al. 2017, equation 1), in plain PyTorch on any device.

    The texts are laid side by side in a padded grid for the attention alone; everything around it stays packed. On two
    CPU cores with 32 texts of 40 to 96 tokens (12 heads of 32) forward and backward take 20 ms, a call for each text
    takes 40 ms. On a CPU there is a grid for each run of texts of about one length (`_alike`). A window much shorter
    than the texts is computed as a band, not as a masked square.

    Args:
        query: (T, H, D), any floating dtype.
        key: (T, G, D), same dtype.
        value: (T, G, D), same dtype.
        cu_seqlens: (N + 1,) integer, the first token of each text and T at the end. A text may be empty.
        max_length: L.
        scale: Factor on the scores; None means 1 / sqrt(D).
        dropout: Probability with which a weight is dropped.
        causal: Whether a token sees only itself and earlier ones.
        window: Tokens further apart than `window` - 1 do not see each other; None means all do.
        bias: (H, 2 L - 1), added to the scaled scores by distance: entry L - 1 + d where the key stands d tokens after
            the query (Raffel et al. 2020, section 2.1). None adds nothing.

    Returns:
        (T, H, D) in the dtype of `query`.
    """
    settings: _Settings = {"scale": scale, "dropout": dropout, "causal": causal, "window": window}
    bounds = cu_seqlens.long()
    # Asking a GPU for the lengths would wait for it, and a compiled step has none to ask.
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return _grid_attention(query, key, value, bounds, max_length, bias, settings)
    lengths = bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    groups = _alike(lengths[order].tolist())
    if len(groups) < 2:
        return _grid_attention(query, key, value, bounds, max_length, bias, settings)
    sorted_lengths = lengths[order]
    place = torch.arange(query.shape[0]) - torch.repeat_interleave(bounds[:-1], lengths)  # of a token in its text
    begins = torch.empty_like(lengths)
    begins[order] = sorted_lengths.cumsum(0) - sorted_lengths
    target = torch.repeat_interleave(begins, lengths) + place  # where each token goes, longest texts first
    source = torch.empty_like(target)
    source[target] = torch.arange(len(target))
    query, key, value = (states.index_select(0, source) for states in (query, key, value))
    parts, first = [], 0
    for count, longest in groups:
        own = sorted_lengths[first : first + count]
        ends = torch.cat([own.new_zeros(1), own.cumsum(0)])
        begin = int(begins[order[first]])
        tokens = slice(begin, begin + int(ends[-1]))
        near = None if bias is None else bias[:, max_length - longest : max_length + longest - 1]
        parts.append(_grid_attention(query[tokens], key[tokens], value[tokens], ends, longest, near, settings))
        first += count
    return torch.cat(parts).index_select(0, target)


class _Settings(TypedDict):
    scale: float | None
    dropout: float
    causal: bool
    window: int | None


def _alike(lengths: list[int]) -> list[tuple[int, int]]:
    """(how many, the longest) of each run of texts that share a grid, from lengths that fall; empty texts are left out.

    A run ends where a text is a quarter shorter than its longest, or where the grid's cells that would stay empty are
    more than a thousand: a grid more costs about as much as those.
    """
    runs: list[tuple[int, int]] = []
    count = longest = spare = 0
    for length in lengths:
        if length == 0:
            break
        if count and (length < 0.75 * longest or spare + longest - length > 1000):
            runs.append((count, longest))
            count = spare = 0
        if not count:
            longest = length
        count, spare = count + 1, spare + longest - length
    return [*runs, (count, longest)] if count else runs


def _grid_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, max_length: int, bias: Tensor | None, settings: _Settings
) -> Tensor:
    """`packed_attention` with all texts in one grid of `max_length`; `bounds` are int64."""
    starts, lengths = bounds[:-1], bounds.diff()
    texts, tokens = starts.numel(), query.shape[0]
    token = torch.arange(tokens, device=query.device)
    text = torch.repeat_interleave(lengths, output_size=tokens)
    cell = text * max_length + token - starts[text]

    def grid(packed: Tensor) -> Tensor:
        heads, size = packed.shape[1:]
        cells = packed.new_zeros(texts * max_length, heads, size).index_copy(0, cell, packed)
        return cells.view(texts, max_length, heads, size).transpose(1, 2)

    queries, keys, values = grid(query), grid(key), grid(value)
    if key.shape[1] != query.shape[1]:
        share = query.shape[1] // key.shape[1]
        keys, values = keys.repeat_interleave(share, dim=1), values.repeat_interleave(share, dim=1)
    scale, dropout, causal, window = settings["scale"], settings["dropout"], settings["causal"], settings["window"]
    if bias is None and window is not None and 0 < 8 * (window - 1) <= max_length:
        out = _banded(queries, keys, values, lengths, scale, dropout, causal, window)
    else:
        mask = _visible(lengths, max_length, causal, window)
        if bias is not None:
            mask = by_distance(bias, max_length).to(query.dtype).masked_fill(~mask, -torch.inf)
        out = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scale)
    return out.transpose(1, 2).reshape(texts * max_length, *query.shape[1:]).index_select(0, cell)


def _visible(lengths: Tensor, max_length: int, causal: bool, window: int | None) -> Tensor:
    """(N, 1, 1 or L, L) bool: which key each query may see. Empty cells see cell 0, so that no row is all false."""
    place = torch.arange(max_length, device=lengths.device)
    mask = (place < lengths.clamp(min=1)[:, None]).view(-1, 1, 1, max_length)
    distance = place[:, None] - place
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        # A query in a cell past the text's end may have no key in reach; it sees itself, and nobody reads it.
        mask = (mask & (distance.abs() < window)) | (distance == 0)
    return mask


def by_distance(bias: Tensor, max_length: int) -> Tensor:
    """(1, H, L, L): the bias of each pair of places, from (H, 2 L - 1) by distance."""
    place = torch.arange(max_length, device=bias.device)
    index = place - place[:, None] + max_length - 1
    # index_select, since the backward of advanced indexing adds one element at a time: 20 times slower on a CPU.
    chosen = bias.index_select(1, index.flatten())
    return chosen.view(1, bias.shape[0], max_length, max_length)


def _banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float | None,
    dropout: float,
    causal: bool,
    window: int,
) -> Tensor:
    """Attention inside a window as a band: blocks of 2 (window - 1) queries, each over its own keys and window - 1 on
    either side (Beltagy et al. 2020, section 3.1), so that the cost grows with the window and not with the text.

    On one CPU core, 12 heads of 64 and a window of 65, forward and backward of 8 texts of 512 tokens take 371 ms where
    the masked square takes 483 ms, of 4 texts of 1024 393 against 879 ms, of 2 texts of 2048 464 against 1979 ms. At
    256 tokens the square is faster: hence the factor of 8 above.

    Args:
        query, key, value: Each (N, H, L, D).
        lengths: (N,), tokens of each text.
        scale, dropout, causal, window: As in `packed_attention`; `window` above 1.
    """
    texts, heads, length, size = query.shape
    reach = window - 1
    block = 2 * reach
    blocks = -(-length // block)
    extra = blocks * block - length
    query = functional.pad(query, (0, 0, 0, extra)).view(texts, heads, blocks, block, size)

    def around(grid: Tensor) -> Tensor:
        padded = functional.pad(grid, (0, 0, reach, extra + reach))
        return padded.unfold(2, block + 2 * reach, block).transpose(-1, -2)

    place = torch.arange(blocks * block, device=query.device).view(blocks, block, 1)
    other = place[:, :1] - reach + torch.arange(block + 2 * reach, device=query.device)
    seen = ((place - other).abs() < window) & (other >= 0)
    if causal:
        seen = seen & (other <= place)
    mask = (seen & (other < lengths.view(-1, 1, 1, 1))) | (place == other)

    def rows(parts: Tensor) -> Tensor:
        return parts.transpose(1, 2).flatten(0, 1)

    out = functional.scaled_dot_product_attention(
        rows(query), rows(around(key)), rows(around(value)), mask.flatten(0, 1)[:, None], dropout, scale=scale
    )
    return out.view(texts, blocks, heads, block, size).transpose(1, 2).flatten(2, 3)[:, :, :length]


def flash_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`packed_attention` for CUDA, by whichever of three kernels was measured to be the fastest (`_kernel`).

    They are FlashAttention-2's in PyTorch (Dao 2023), cuDNN's where every text has L tokens, as long ones cut to the
    model's limit do, and ours in Triton (`biased_attention`), which alone takes a bias and float32. None but the plain
    version takes float64. Under autocast float32 states, as a norm of queries makes them, are taken in its dtype.
    """
    if query.dtype == torch.float32:
        dtype = compute_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    arguments = (query, key, value, cu_seqlens, max_length)
    if window is not None and window >= max_length:
        window = None
    if bias is None and query.dtype in (torch.float16, torch.bfloat16):
        dense = window is None and query.shape[0] == (cu_seqlens.shape[0] - 1) * max_length
        kernel = _kernel(query, key, max_length, dropout, dense)
        if dropout > 0.0 and SOURCE.again and _triton_runs(query.device.index):
            kernel = "tiles"  # which alone drops the same again where a layer is computed twice
    elif bias is not None and query.is_cuda and query.dtype != torch.float64 and query.shape[2] <= 256 and HAS_TRITON:
        kernel = "tiles"
    else:
        kernel = "plain"
    if kernel == "dense":
        return _dense_attention(query, key, value, max_length, scale, dropout, causal)
    if kernel == "flash":
        return _flash_attention(*arguments, scale=scale, dropout=dropout, causal=causal, window=window)
    operation = packed_attention
    if kernel == "tiles":
        from .biased_attention import biased_attention as operation
    return operation(*arguments, scale=scale, dropout=dropout, causal=causal, window=window, bias=bias)


def _kernel(query: Tensor, key: Tensor, max_length: int, dropout: float, dense: bool) -> str:
    """The kernel for 16-bit states without a bias; `dense` where every text has L tokens.

    Milliseconds on an H200, forward and backward, FlashAttention-2 / Triton / cuDNN, from `benchmarks/kernels.py`
    (results/attention-2026-11-26-h200.jsonl): 64 texts of 512, 16 heads of 64: 1.19 / 1.02 / 0.80, with dropout 1.39 /
    1.49 / 1.18; of natural lengths 0.44 / 0.31, with dropout 0.49 / 0.45; with a window of 65 0.40 / 0.22; 12 heads of
    32 with dropout 0.30 / 0.31 natural and 0.75 / 0.99 / 0.85 dense, 128 texts of up to 128 0.16 / 0.11. Of heads of
    128 and 256 and of grouped ones FlashAttention's are faster than Triton's, but for short texts; 16 heads of 128 on
    8, causal, 64 texts of 512: 1.85 / 1.05 by cuDNN, which takes groups as they are.
    """
    size = query.shape[2]
    alike = query.shape[1] == key.shape[1]
    fixed = torch.are_deterministic_algorithms_enabled()  # cuDNN's backward adds up in any order
    whole = dense and 32 < size <= 128 and size % 8 == 0 and max_length % 64 == 0 and not fixed
    if whole and _cudnn_is_new(query.device.index):
        return "dense"
    small = size <= 64 and alike and _triton_runs(query.device.index)
    if small and (dropout == 0.0 or size > 32 or (max_length <= 128 and not dense)):
        return "tiles"
    return "flash"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cudnn_is_new(index: int | None) -> bool:
    """Whether a card (None: the current one) is of Hopper's kind or later, and cuDNN at hand."""
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.is_available()) and torch.cuda.get_device_capability(index) >= (9, 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_runs(index: int | None) -> bool:
    """Whether Triton can make kernels for a card (None: the current one): it compiles a launcher with a C compiler."""
    compiler = "CC" in os.environ or any(map(shutil.which, ("cc", "gcc", "clang")))
    return HAS_TRITON and compiler and torch.cuda.get_device_capability(index) >= (8, 0)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """`torch.nn.attention.varlen` wraps the same operator but has no dropout, so the operator itself is called."""
    bounds = cu_seqlens.int()
    left = None if window is None else window - 1
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, max_length, max_length, dropout, causal, False,
        scale=scale, window_size_left=left, window_size_right=0 if causal else left,
    )[0]  # fmt: skip
    return out


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, length: int, scale: float | None, dropout: float, causal: bool
) -> Tensor:
    """Attention of texts of `length` tokens each by cuDNN. (T, H, D) to (T, H, D)."""
    states = (each.view(-1, length, *each.shape[1:]).transpose(1, 2) for each in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *states, None, True, dropout, causal, False, scale=scale
    )[0]
    return out.transpose(1, 2).reshape(query.shape)
