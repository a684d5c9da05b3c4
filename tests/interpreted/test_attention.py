"""The attention kernels against attention in float64: outputs, gradients, the bias's gradient, dropout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.kernels import attention
from burnish.kernels import biased_attention as module

biased_attention: Callable[..., Tensor] = module.biased_attention
packed_attention: Callable[..., Tensor] = attention.packed_attention
NAMES = ("output", "query", "key", "value", "bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and 32, so that short texts take several of them, in every kernel of other shapes."""
    tiles = ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1))
    monkeypatch.setattr(module, "launch", lambda size, dtype: tiles)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths: tuple[int, ...], heads: int, groups: int, size: int, longest: int) -> list[Tensor]:
    """Query, key, value, bias and the gradient that comes back, all float64."""
    draw = torch.Generator().manual_seed(sum(lengths))
    tokens = sum(lengths)
    shapes = [(tokens, heads, size), *[(tokens, groups, size)] * 2, (heads, 2 * longest - 1), (tokens, heads, size)]
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def run(operation: Any, states: list[Tensor], dtype: torch.dtype, *where: Any, **options: Any) -> list[Tensor]:
    """[output, dq, dk, dv, dbias] in `dtype`, widened to float64."""
    leaves = [state.detach().to(dtype).requires_grad_() for state in states[:4]]
    out = operation(*leaves[:3], *where, bias=leaves[3], **options)
    assert out.dtype == dtype and out.shape == leaves[0].shape
    out.backward(states[4].to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def compare(
    lengths: tuple[int, ...], heads: tuple[int, int], size: int, extra: int = 0, **options: Any
) -> list[Tensor]:
    longest = max(lengths) + extra
    states = inputs(lengths, *heads, size, longest)
    expected = run(packed_attention, states, torch.float64, bounds(lengths), longest, **options)
    found = run(biased_attention, states, torch.float32, bounds(lengths), longest, **options)
    for name, ours, truth in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5, msg=name)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 7}, {"causal": True, "window": 20, "scale": 0.3}], ids=str
)
def test_ragged_texts_equal_float64(options: dict[str, Any]) -> None:
    found = compare((5, 0, 1, 35), (2, 1), 24, **options)
    assert all(values.abs().max() > 0.1 for values in found), "a gradient of nothing proves nothing"


@pytest.mark.parametrize("lengths, size", [((1,), 16), ((1, 1, 1), 16), ((16, 32), 32), ((33,), 128), ((48,), 8)])
def test_round_and_extreme_shapes_equal_float64(lengths: tuple[int, ...], size: int) -> None:
    compare(lengths, (1, 1), size)


@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes minutes
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any).map(tuple),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    size=st.sampled_from([16, 40]),
    extra=st.integers(0, 60),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50),
)
def test_any_lengths_equal_float64(
    lengths: tuple[int, ...], heads: tuple[int, int], size: int, extra: int, causal: bool, window: int | None
) -> None:
    """`extra`: how much longer than the longest text the caller says a text may be."""
    compare(lengths, heads, size, extra, causal=causal, window=window)


def test_without_a_bias_and_from_views_of_one_product() -> None:
    lengths = (3, 20)
    joined = torch.randn(23, 3, 2, 16, requires_grad=True)
    out = biased_attention(*joined.unbind(1), bounds(lengths), 20)
    torch.autograd.backward(out.sum())
    wide = joined.detach().double().requires_grad_()
    expected = packed_attention(*wide.unbind(1), bounds(lengths), 20)
    torch.autograd.backward(expected.sum())
    assert joined.grad is not None and wide.grad is not None and wide.grad.abs().max() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_half_precision_is_within_twice_the_error_of_the_plain_version() -> None:
    lengths = (5, 1, 37)
    states = inputs(lengths, 2, 2, 32, 37)
    truth = run(packed_attention, states, torch.float64, bounds(lengths), 37)
    plain = run(packed_attention, states, torch.float16, bounds(lengths), 37)
    ours = run(biased_attention, states, torch.float16, bounds(lengths), 37)
    for name, found, half, exact in zip(NAMES, ours, plain, truth, strict=True):
        allowed = (half - exact).abs().max()
        assert allowed > 0, "plain float16 has no error: the bound would prove nothing"
        assert (found - exact).abs().max() <= 2 * allowed, name


def test_dropout_s_keys_are_independent_though_their_numbers_come_from_their_places() -> None:
    """Centred masks, 131,072 in all: numbers in even steps would leave 0.19 on the mean product of three keys."""
    lengths, heads, size, share = (64,) * 8, 4, 64, 0.1
    query, key = (torch.zeros(sum(lengths), heads, size) for _ in range(2))
    shown = torch.eye(size).repeat(len(lengths), 1)[:, None].expand(-1, heads, -1).contiguous()
    torch.manual_seed(3)
    weights = biased_attention(query, key, shown, bounds(lengths), size, dropout=share)
    mask = ((weights != 0).double() - (1 - share)) / math.sqrt(share * (1 - share))
    texts = mask.view(len(lengths), size, heads, size)
    products = [texts[..., step:] * texts[..., :-step] for step in (1, 2, 5)]
    products += [texts[..., 2 * step :] * texts[..., step:-step] * texts[..., : -2 * step] for step in (1, 2, 5)]
    products += [texts[:, 1:] * texts[:, :-1], texts[1:] * texts[:-1], texts[:, :, 1:] * texts[:, :, :-1]]
    products += [products[0][:, 1:] * products[0][:, :-1]]  # the corners of a rectangle
    for product in [mask, *products]:
        assert product.mean().abs() < 5 * product.std() / math.sqrt(product.numel())


def test_dropout_is_the_plain_formula_with_the_mask_that_was_drawn() -> None:
    lengths, size, share = (9, 30, 1), 32, 0.25
    states = inputs(lengths, 2, 2, size, 30)
    # A value that is 1 at its key's place makes the output the weights themselves, (T, H, places).
    places = torch.cat([torch.arange(length) for length in lengths])
    shown = torch.eye(size)[places][:, None].expand(-1, 2, -1).contiguous()
    query, key, _, bias, _ = (state.float() for state in states)
    torch.manual_seed(7)
    weights = biased_attention(query, key, shown, bounds(lengths), 30, bias=bias, dropout=share)
    kept = weights != 0
    torch.manual_seed(7)
    found = run(biased_attention, states, torch.float32, bounds(lengths), 30, dropout=share)

    leaves = [state.clone().requires_grad_() for state in states[:4]]
    table = attention.by_distance(leaves[3], 30)[0]
    outs = []
    for start, length in zip(bounds(lengths).tolist(), lengths, strict=False):
        q, k, v = (leaf[start : start + length].transpose(0, 1) for leaf in leaves[:3])
        scores = q @ k.transpose(1, 2) / math.sqrt(size) + table[:, :length, :length]
        mask = kept[start : start + length, :, :length].transpose(0, 1)
        outs.append((scores.softmax(-1) * mask / (1 - share) @ v).transpose(0, 1))
    expected = torch.cat(outs)
    torch.autograd.backward(expected, states[4])
    truth = [expected.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    for name, ours, theirs in zip(NAMES, found, truth, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
    live = kept[9:39, :, :30].double().mean()
    assert 0.70 < live < 0.80, f"{live} of the weights were kept"
    # Another head, another draw: not the same mask.
    assert not torch.equal(kept[9:39, 0], kept[9:39, 1])
    assert not torch.equal(biased_attention(query, key, shown, bounds(lengths), 30, bias=bias, dropout=share), weights)


def test_drops_are_as_good_as_independent() -> None:
    """Among 1.2 million weights: the share dropped, neighbours in both directions, and the corners of rectangles."""
    size, share = 768, 0.1
    numbers = torch.randint(-(2**31), 2**31, (2, 2, size), dtype=torch.int64)
    mixed = (numbers[0, :, :, None] + numbers[1, :, None, :]) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    lost = ((mixed ^ (mixed >> 16)) < round(share * 2**32)).double() - share
    deviation = math.sqrt(share * (1 - share))

    def near(values: Tensor, spread: float) -> bool:
        """Within four standard errors of 0."""
        return bool(values.mean().abs() < 4 * spread / math.sqrt(values.numel()))

    assert near(lost, deviation)
    assert near(lost[:, 1:] * lost[:, :-1], deviation**2)
    assert near(lost[:, :, 1:] * lost[:, :, :-1], deviation**2)
    assert near(lost[0] * lost[1], deviation**2)
    corners = lost[:, ::2, ::2] * lost[:, 1::2, ::2] * lost[:, ::2, 1::2] * lost[:, 1::2, 1::2]
    assert near(corners, deviation**4)
    rows = lost.sum(2).flatten()
    assert abs(rows.var().item() / (size * deviation**2) - 1) < 0.1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bias": torch.zeros(2, 8)}, "the bias is"),
        ({"dropout": 1.0}, "dropout"),
        ({"window": 0}, "window"),
        ({"dtype": torch.float64}, "float64"),
        ({"size": 512}, "larger than 256"),
        ({"groups": 3}, "do not go"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], words: str) -> None:
    size, groups, dtype = change.pop("size", 16), change.pop("groups", 2), change.pop("dtype", torch.float32)
    query, key = torch.zeros(4, 2, size, dtype=dtype), torch.zeros(4, groups, size, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        biased_attention(query, key, key, bounds((4,)), 4, **change)


def test_no_text_at_all() -> None:
    leaves = [torch.zeros(0, 2, 16, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(2, 9, requires_grad=True)
    for where in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        torch.autograd.backward(biased_attention(*leaves, where, 5, bias=bias).sum())
    assert bias.grad is not None and bias.grad.shape == (2, 9)


def test_registered_as_pytorch_expects() -> None:
    states = [state.float().requires_grad_() for state in inputs((3, 6), 2, 2, 16, 6)[:4]]
    for grad_of_bias in (True, False):
        arguments = (*states[:3], states[3].detach().requires_grad_(grad_of_bias), bounds((3, 6)), None)
        torch.library.opcheck(torch.ops.burnish.biased_attention, (*arguments, 6, 0.25, 0.0, False, 0))


def test_compiled_without_a_break() -> None:
    lengths = (5, 20)
    states = inputs(lengths, 2, 2, 16, 20)
    compiled = torch.compile(biased_attention, fullgraph=True, backend="aot_eager")
    found = run(compiled, states, torch.float32, bounds(lengths), 20)
    plain = run(biased_attention, states, torch.float32, bounds(lengths), 20)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours, theirs)
    dropped = [compiled(*states[:3], bounds(lengths), 20, dropout=0.5) for states in [[s.float() for s in states]] * 2]
    assert not torch.equal(*dropped)
