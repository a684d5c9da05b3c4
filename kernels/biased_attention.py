"""Attention over packed texts in Triton, with a bias by distance and with dropout: MPNet's and T5's attention on CUDA.

FlashAttention's kernels take no bias, and the plain version makes its table for each text and pads the texts. The plain
version is `attention.packed_attention`, the tiles are in `biased_attention_tiles`.

T: tokens of all texts, H: query heads, G: key/value heads (H a multiple of G), D: head size, N: texts, L: longest text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from . import biased_attention_tiles as tiles
from .light_dropout import numbers as random_numbers
from .light_dropout import threshold

LOG2E = math.log2(math.e)
LARGEST = 256

# (queries, keys, warps, stages) of the forward, of the gradient of queries, of that of keys and values, and of the
# bias's, for each head size up to the key. By Triton 3.6 for an H100, each takes at most 66 KB of shared memory, where
# the smallest card has 99 KB, and 255 registers without spilling (queries' gradients of float32 heads above 64 spill).
Blocks = tuple[int, int, int, int]
Launch = tuple[Blocks, Blocks, Blocks, Blocks]
HALF: dict[int, Launch] = {
    64: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
    128: ((64, 32, 4, 2), (64, 32, 8, 1), (32, 64, 8, 1), (64, 64, 8, 1)),
    256: ((64, 32, 8, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
}
SINGLE: dict[int, Launch] = {
    64: ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    128: ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1)),
    256: ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
TABLES = {torch.float16: HALF, torch.bfloat16: HALF, torch.float32: SINGLE}


def biased_attention(
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
    """`attention.packed_attention` as Triton kernels: the same arguments and result.

    Products are made in the inputs' dtype and added up in float32; those of float32 inputs follow
    `torch.set_float32_matmul_precision`. Dropout draws 8 bytes for each head and token from torch's generator, so that
    each replay of a CUDA graph drops others, or makes them of a seed (`light_dropout.seeded`).
    Gradients, the bias's too, are the same in every run.

    Args:
        query: (T, H, D), float16, bfloat16 or float32, D at most 256.
        key, value: (T, G, D), same dtype.
        cu_seqlens: (N + 1,) integer, the first token of each text and T at the end. A text may be empty.
        max_length: L; a larger number costs almost nothing.
        scale: Factor on the scores; None means 1 / sqrt(D).
        dropout: Probability with which a weight is dropped, below 1.
        causal: Whether a token sees only itself and earlier ones.
        window: Tokens further apart than `window` - 1 do not see each other; None means all do.
        bias: (H, 2 L - 1), any floating dtype, added to the scaled scores by distance; None adds nothing.

    Raises:
        ValueError: If a shape, a dtype, the probability or the window is none of these, or if the card is older than
            compute capability 8.0, for whose tensor cores Triton makes no code.
    """
    _check(query, key, value, max_length, dropout, window, bias)
    numbers = None
    if dropout > 0.0:
        tokens, heads, _ = query.shape
        numbers = random_numbers(query, (2 * tokens + 1) * heads, 0)
    out: Tensor = _attend(
        query, key, value, bias, cu_seqlens.int(), numbers, max_length,
        1 / math.sqrt(query.shape[2]) if scale is None else scale, dropout, causal, 0 if window is None else window,
    )[0]  # fmt: skip
    return out


def _check(
    query: Tensor, key: Tensor, value: Tensor, max_length: int, dropout: float, window: int | None, bias: Tensor | None
) -> None:
    tokens, heads, size = query.shape
    if key.shape != value.shape or key.shape[0] != tokens or key.shape[2] != size or heads % key.shape[1]:
        raise ValueError(f"biased_attention: queries {tuple(query.shape)} do not go with keys {tuple(key.shape)}")
    if query.dtype not in TABLES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"biased_attention: {query.dtype} is not float16, bfloat16 or float32 throughout")
    if size > LARGEST:
        raise ValueError(f"biased_attention: heads of {size} are larger than {LARGEST}. Use packed_attention")
    if bias is not None and bias.shape != (heads, 2 * max_length - 1):
        raise ValueError(f"biased_attention: the bias is {tuple(bias.shape)}, not {(heads, 2 * max_length - 1)}")
    threshold(dropout)
    if window is not None and window < 1:
        raise ValueError(f"biased_attention: a window of {window} hides a token from itself")


def launch(size: int, dtype: torch.dtype) -> Launch:
    """The row of the tables above for a head size."""
    return next(row for limit, row in TABLES[dtype].items() if size <= limit)


def _settings(
    query: Tensor, key: Tensor, bias: Tensor | None, dropout: float, causal: bool, window: int
) -> dict[str, Any]:
    """What all kernels are compiled for."""
    size = query.shape[2]
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "HEADS": query.shape[1], "SHARE": query.shape[1] // key.shape[1], "SIZE": size,
        "PADDED": max(16, triton.next_power_of_2(size)), "BIASED": bias is not None, "CAUSAL": causal,
        "WINDOWED": window > 0, "THRESHOLD": threshold(dropout), "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[int]]:
    """Each with numbers of a head side by side, and their strides by token and head."""
    states = [each if each.stride(2) == 1 else each.contiguous() for each in (query, key, value)]
    return states, [stride for each in states for stride in each.stride()[:2]]


def _table(bias: Tensor | None, query: Tensor) -> Tensor:
    """The bias in units of log2; without one, any pointer, which is not read.

    In float16 beside 16-bit queries, which is what the plain version rounds it to, or closer. Loads of 32 bits would be
    copied ahead to shared memory, one by one: 32 KB more for each stage.
    """
    if bias is None:
        return query
    table = bias.float() * LOG2E
    if query.dtype != torch.float32:
        table = table.clamp(-65504, 65504).half()
    return table.contiguous()


@torch.library.custom_op(
    "burnish::biased_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor bounds, Tensor? numbers, SymInt longest, "
    "float scale, float dropout, bool causal, SymInt window) -> (Tensor, Tensor)",
)
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor, numbers: Tensor | None,
    longest: int, scale: float, dropout: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, H, D) output and (H, T) float32 log2 of each query's sum of exponentials; `window` 0 is none."""
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        raise ValueError("biased_attention: Triton needs a GPU of compute capability 8.0. Use packed_attention")
    tokens, heads, size = query.shape
    out = query.new_empty(tokens, heads, size)
    log_sum = query.new_empty(heads, tokens, dtype=torch.float32)
    if tokens == 0:
        return out, log_sum
    rows, columns, warps, stages = launch(size, query.dtype)[0]
    states, strides = _inputs(query, key, value)
    grid = ((bounds.numel() - 1) * heads * triton.cdiv(longest, rows),)
    tiles.forward[grid](
        *states, _table(bias, query), bounds, bounds if numbers is None else numbers, out, log_sum, *strides,
        tokens, longest, scale * LOG2E, window, 1 / (1 - dropout),
        **_settings(query, key, bias, dropout, causal, window), ROWS=rows, COLUMNS=columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, log_sum


@_attend.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op(
    "burnish::biased_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor bounds, Tensor? numbers, "
    "Tensor out, Tensor log_sum, SymInt longest, float scale, float dropout, bool causal, SymInt window, "
    "bool bias_too) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor,
    numbers: Tensor | None, out: Tensor, log_sum: Tensor, longest: int, scale: float, dropout: float, causal: bool,
    window: int, bias_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values, and the bias's in float32: (H, 2 L - 1), or (0,) unless `bias_too`."""
    tokens, heads, size = query.shape
    grads = [each.new_empty(each.shape) for each in (query, key, value)]
    width = 2 * longest - 1
    if tokens == 0:
        return *grads, log_sum.new_zeros((heads, width) if bias_too else 0)  # type: ignore[return-value]
    grad = grad.contiguous()
    delta = torch.empty_like(log_sum)
    states, strides = _inputs(query, key, value)
    table = _table(bias, query)
    drawn = bounds if numbers is None else numbers
    texts = bounds.numel() - 1
    row_blocks, key_blocks = launch(size, query.dtype)[1:3]
    settings = _settings(query, key, bias, dropout, causal, window)
    numbers_too = (tokens, longest, scale * LOG2E, window, 1 / (1 - dropout))

    rows, columns, warps, stages = row_blocks
    tiles.query_gradient[(texts * heads * triton.cdiv(longest, rows),)](
        *states, table, bounds, drawn, out, log_sum, grad, delta, grads[0], *strides, *numbers_too,
        **settings, ROWS=rows, COLUMNS=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    rows, columns, warps, stages = key_blocks
    tiles.key_gradient[(texts * key.shape[1] * triton.cdiv(longest, columns),)](
        *states, table, bounds, drawn, log_sum, grad, delta, grads[1], grads[2], *strides, *numbers_too,
        **settings, ROWS=rows, COLUMNS=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not bias_too:
        return *grads, log_sum.new_empty(0)  # type: ignore[return-value]

    block, _, warps, stages = launch(size, query.dtype)[3]
    many = triton.cdiv(longest, block)
    diagonals = 2 * many - 1
    # Enough programs for a large card, eight for each of 132 multiprocessors; each writes one tile.
    splits = max(1, min(texts, -(-1056 // (heads * diagonals))))
    sums = log_sum.new_empty(heads, diagonals, splits, block, block)
    tiles.bias_gradient[(heads * diagonals * splits,)](
        *states, table, bounds, drawn, log_sum, grad, delta, sums, *strides, tokens, longest, texts, splits,
        *numbers_too[2:], **settings, BLOCK=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return *grads, _by_distance(sums.sum(2), longest)  # type: ignore[return-value]


def _by_distance(sums: Tensor, longest: int) -> Tensor:
    """(H, 2 L - 1): the sum of each distance, from (H, 2 B - 1, S, S) sums along the diagonals of tiles of S x S."""
    heads, diagonals, block, _ = sums.shape
    # Laid out S wider and read S wider less one, each row of a tile begins one further left than the row below.
    wide = functional.pad(sums.flip(2), (0, block)).flatten(2)[:, :, :-block]
    skewed = wide.view(heads, diagonals, block, 2 * block - 1).sum(2)
    halves = functional.pad(skewed, (0, 1)).view(heads, diagonals, 2, block)
    # A tile's later distances are the next tile's earlier ones.
    joined = functional.pad(halves[:, :, 0], (0, 0, 0, 1)) + functional.pad(halves[:, :, 1], (0, 0, 1, 0))
    first = (diagonals + 1) // 2 * block - longest
    # Contiguous, as the fake kernel says: compiled code relies on it.
    return joined.flatten(1)[:, first : first + 2 * longest - 1].contiguous()


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest, bias_too = rest[5], rest[-1]
    made = query.new_empty((query.shape[1], 2 * longest - 1) if bias_too else (0,), dtype=torch.float32)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), made


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, bounds, numbers, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bias, bounds, numbers, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, bias, bounds, numbers, out, log_sum = ctx.saved_tensors
    bias_too = ctx.needs_input_grad[3]
    *grads, table = _attend_backward(
        grad, query, key, value, bias, bounds, numbers, out, log_sum, *ctx.options, bias_too
    )
    return *grads, table.to(bias.dtype) if bias_too else None, *(None,) * 7


_attend.register_autograd(_backward, setup_context=_keep)
