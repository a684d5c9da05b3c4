"""Packed attention against attention text by text in float64: outputs and gradients."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.kernels import attention
from burnish.kernels.attention import _alike

packed_attention: Callable[..., Tensor] = attention.packed_attention
RAGGED = (5, 1, 12, 7)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    """(N + 1,) int32, as a packed batch carries them."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths: tuple[int, ...], heads: int, groups: int, size: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value and the gradient that comes back, all float64."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = [(tokens, heads, size), (tokens, groups, size), (tokens, groups, size), (tokens, heads, size)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition, one text at a time, with no mask but the one it spells out."""
    out = []
    share = query.shape[1] // key.shape[1]
    for start, length in zip(bounds(lengths).tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        q, k, v = query[rows], key[rows].repeat_interleave(share, 1), value[rows].repeat_interleave(share, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(query.shape[2]) if scale is None else scale)
        for i, j in itertools.product(range(length), repeat=2):
            if bias is not None:
                scores[:, i, j] += bias[:, max(lengths) - 1 + j - i]
            if (causal and j > i) or (window is not None and abs(i - j) >= window):
                scores[:, i, j] = -math.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(out)


def run(operation: Any, states: list[Tensor], dtype: torch.dtype, *where: Any, **options: Any) -> list[Tensor]:
    """[output, dq, dk, dv] in `dtype`, widened to float64."""
    leaves = [state.detach().to(dtype).requires_grad_() for state in states[:3]]
    out = operation(*leaves, *where, **options)
    assert out.dtype == dtype and out.shape == leaves[0].shape
    out.backward(states[3].to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def compare(
    lengths: tuple[int, ...], heads: int, groups: int, dtype: torch.dtype, tolerance: float, **options: Any
) -> None:
    states = inputs(lengths, heads, groups, 8)
    expected = run(by_text, states, torch.float64, lengths, **options)
    found = run(packed_attention, states, dtype, bounds(lengths), max(lengths), **options)
    assert len(found) == 4
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [(6,), (1,), (1, 1, 1), (4, 4, 4), RAGGED], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"causal": True},
        {"window": 3},
        {"window": 1},
        {"window": 100},
        {"causal": True, "window": 3, "scale": 1.0},
    ],
    ids=str,
)
def test_equals_attention_text_by_text(
    lengths: tuple[int, ...], groups: int, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    compare(lengths, 4, groups, dtype, tolerance, **options)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(any).map(tuple),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 20),
    scale=st.none() | st.floats(0.05, 2.0),
)
def test_equals_attention_text_by_text_for_any_lengths(
    lengths: tuple[int, ...], heads: tuple[int, int], causal: bool, window: int | None, scale: float | None
) -> None:
    compare(lengths, *heads, torch.float64, 1e-10, causal=causal, window=window, scale=scale)


@pytest.mark.parametrize("window, causal", [(2, False), (4, False), (5, True), (9, False), (13, True)])
def test_a_window_is_a_band_and_equals_the_masked_square(window: int, causal: bool) -> None:
    lengths = (8 * (window - 1), 3, 0, 23, 1, 100)
    assert 8 * (window - 1) <= max(lengths), "this would be computed as a square"
    compare(lengths, 4, 2, torch.float64, 1e-12, window=window, causal=causal)


def test_a_band_holds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks grow with the window, not with the square of the text."""
    sizes = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(mask.numel())
        return plain(query, key, value, mask, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    for length in (64, 128, 256):
        packed_attention(*inputs((length, length), 4, 4, 8)[:3], bounds((length, length)), length, window=5)
    assert sizes == [2 * 16 * length for length in (64, 128, 256)]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 4}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("lengths", [(6,), (1, 1), RAGGED], ids=str)
def test_a_bias_by_distance_is_added_and_trained(lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(5)
    table = torch.randn(4, 2 * max(lengths) - 1, generator=draw, dtype=torch.float64)
    found = []
    for operation, where in ((by_text, (lengths,)), (packed_attention, (bounds(lengths), max(lengths)))):
        bias = table.clone().requires_grad_()
        results = run(operation, inputs(lengths, 4, 4, 8), torch.float64, *where, bias=bias, **options)
        assert bias.grad is not None
        found.append([*results, bias.grad])
    assert max(lengths) == 1 or found[0][4].abs().max() > 1e-3
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    bare = run(packed_attention, inputs(lengths, 4, 4, 8), torch.float64, bounds(lengths), max(lengths), **options)
    assert max(lengths) == 1 or not torch.allclose(bare[0], found[1][0])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 4}], ids=str)
def test_bfloat16_is_within_twice_the_error_of_plain_bfloat16(options: dict[str, Any]) -> None:
    """Three ways: ours in bfloat16, the definition in bfloat16, the definition in float32."""
    states = inputs(RAGGED, 4, 2, 16)
    truth = run(by_text, states, torch.float32, RAGGED, **options)
    plain = run(by_text, states, torch.bfloat16, RAGGED, **options)
    ours = run(packed_attention, states, torch.bfloat16, bounds(RAGGED), max(RAGGED), **options)
    for name, found, half, exact in zip("oqkv", ours, plain, truth, strict=True):
        allowed = (half - exact).abs().max()
        assert allowed > 0, "plain bfloat16 has no error: the bound would prove nothing"
        assert (found - exact).abs().max() <= 2 * allowed + 1e-6, name


def test_no_text_sees_another() -> None:
    states = inputs(RAGGED, 4, 4, 8)
    before = packed_attention(*states[:3], bounds(RAGGED), max(RAGGED))
    changed = [state.clone() for state in states]
    changed[1][6:18] += 5.0  # the keys and values of the third text
    changed[2][6:18] -= 5.0
    after = packed_attention(*changed[:3], bounds(RAGGED), max(RAGGED))
    moved = (after - before).abs().amax((1, 2)) > 0
    assert moved[6:18].all() and not moved[:6].any() and not moved[18:].any()


def test_every_gradient_flows() -> None:
    states = inputs(RAGGED, 4, 2, 8)
    _, *gradients = run(packed_attention, states, torch.float64, bounds(RAGGED), max(RAGGED))
    assert len(gradients) == 3
    tokens = {
        "query": (torch.arange(25) != 5),
        "key": (torch.arange(25) != 5),
        "value": torch.ones(25, dtype=torch.bool),
    }
    for (name, expected), gradient in zip(tokens.items(), gradients, strict=True):
        # The only token of a text (the sixth here) attends to itself whatever its query and key are.
        assert torch.equal(gradient.abs().amax((1, 2)) > 1e-12, expected), name


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    lengths, size = (8, 5, 3), 4
    query, key, _, _ = inputs(lengths, 2, 2, size)
    # A value per position makes the output the weights themselves.
    places = torch.cat([torch.arange(length) for length in lengths])
    value = torch.eye(8, dtype=torch.float64)[places][:, None].expand(-1, 2, -1).contiguous()
    padded = torch.cat([query, query.new_zeros(16, 2, 4)], dim=2), torch.cat([key, key.new_zeros(16, 2, 4)], dim=2)
    weights = packed_attention(*padded, value, bounds(lengths), 8)
    torch.manual_seed(1)
    draws = torch.stack([packed_attention(*padded, value, bounds(lengths), 8, dropout=0.25) for _ in range(1500)])
    live = weights > 0
    assert 0.23 < (draws[:, live] == 0).double().mean() < 0.27
    kept = draws[0][live] != 0
    torch.testing.assert_close(draws[0][live][kept], (weights[live] / 0.75)[kept])
    torch.testing.assert_close(draws.mean(0), weights, rtol=0, atol=0.06)
    assert (draws[:, ~live] == 0).all()


def test_no_dropout_is_deterministic() -> None:
    states = inputs(RAGGED, 4, 4, 8)
    first, second = (packed_attention(*states[:3], bounds(RAGGED), max(RAGGED), dropout=0.0) for _ in range(2))
    dropped = packed_attention(*states[:3], bounds(RAGGED), max(RAGGED), dropout=0.5)
    assert torch.equal(first, second) and not torch.equal(first, dropped)


@given(lengths=st.lists(st.integers(0, 300), max_size=80))
def test_texts_of_about_one_length_share_a_grid(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)
    runs = _alike(ordered)
    full = [length for length in ordered if length]
    assert sum(count for count, _ in runs) == len(full)
    first = 0
    for count, longest in runs:
        own = full[first : first + count]
        assert own[0] == longest and min(own) >= 0.75 * longest
        assert count * longest - sum(own) <= 1000
        first += count


def test_a_batch_of_many_lengths_is_cut_and_one_of_alike_lengths_is_not() -> None:
    assert _alike([300, 290, 100, 90, 10, 0]) == [(2, 300), (2, 100), (1, 10)]
    assert _alike([100, 99, 98, 90]) == [(4, 100)]
    assert _alike([100] * 50 + [90] * 150) == [(150, 100), (50, 90)]
    assert _alike([0, 0]) == []


HOPPER, AMPERE, NONE = (9, 0), (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "longest", "dropout", "dense", "card", "kernel"),
    [
        (16, 16, 64, 512, 0.1, True, HOPPER, "dense"),
        (16, 16, 64, 500, 0.1, True, HOPPER, "tiles"),  # no whole 64s
        (16, 16, 64, 512, 0.1, True, AMPERE, "tiles"),
        (16, 16, 64, 512, 0.1, False, HOPPER, "tiles"),
        (16, 16, 64, 512, 0.1, False, NONE, "flash"),
        (12, 12, 32, 512, 0.1, False, HOPPER, "flash"),
        (12, 12, 32, 128, 0.1, False, HOPPER, "tiles"),
        (12, 12, 32, 128, 0.1, True, HOPPER, "flash"),
        (12, 12, 32, 512, 0.0, True, HOPPER, "tiles"),
        (16, 8, 128, 512, 0.0, True, HOPPER, "dense"),
        (16, 8, 64, 512, 0.0, False, HOPPER, "flash"),
        (3, 3, 256, 512, 0.0, True, HOPPER, "flash"),
    ],
)
def test_the_kernel_measured_fastest_is_taken(
    heads: int, groups: int, size: int, longest: int, dropout: float, dense: bool, card: tuple[int, int], kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setenv("CC", "cc")
    query, key = (torch.empty(4, many, size, dtype=torch.bfloat16) for many in (heads, groups))
    assert attention._kernel(query, key, longest, dropout, dense) == kernel
    if kernel == "dense":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        other = "tiles" if size <= 64 and heads == groups else "flash"
        assert attention._kernel(query, key, longest, dropout, dense) == other
    if kernel == "tiles":
        monkeypatch.delenv("CC")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert attention._kernel(query, key, longest, dropout, dense) == "flash"


def test_float32_states_are_taken_in_autocast_s_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 and Gemma norm queries and keys, which float32 weights make float32 under autocast."""
    seen: list[torch.dtype] = []

    def watched(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(query.dtype)
        return query

    monkeypatch.setattr(attention, "_kernel", lambda *_: "flash")
    monkeypatch.setattr(attention, "_flash_attention", watched)
    states = [state.float() for state in inputs(RAGGED, 2, 2, 16)[:3]]
    states[2] = states[2].bfloat16()  # values come from a product, which autocast makes 16 bits already
    with torch.autocast("cpu", torch.bfloat16):
        out = attention.flash_packed_attention(states[0], states[1], states[2], bounds(RAGGED), max(RAGGED))
    assert seen == [torch.bfloat16] and out.dtype == torch.bfloat16
    states[2] = states[2].float()
    out = attention.flash_packed_attention(states[0], states[1], states[2], bounds(RAGGED), max(RAGGED))
    assert seen == [torch.bfloat16] and out.dtype == torch.float32
