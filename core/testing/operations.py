"""Checks of an operation's implementation against the plain one that comes with the reference backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import KernelSpec
from ..errors import ConfigError
from ..registry import registry
from .find import offers

LENGTHS = ((5, 1, 12, 7), (1,), (0, 3, 0), (1, 1, 1, 1), (64, 40, 3), (33, 33))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": 5},
    {"window": 1},
    {"causal": True, "window": 3},
    {"scale": 0.3},
    {"bias": True},
    {"bias": True, "scale": 0.5, "causal": True},
)


def packed_attention(found: Any, expected: Any, dtype: torch.dtype, device: str, tolerance: float) -> str:
    """Outputs and gradients for ragged texts, shared key heads, windows, causal order, scales and biases."""
    worst = 0.0
    cases = list(itertools.product(LENGTHS, OPTIONS, ((4, 4, 8), (6, 2, 16))))
    for lengths, options, shape in cases:
        mine = _run_attention(found, lengths, shape, dict(options), dtype, device)
        reference = _run_attention(expected, lengths, shape, dict(options), dtype, device)
        for name, ours, theirs in zip("oqkvb", mine, reference, strict=False):
            top = max(float(theirs.abs().max()), 1e-3)
            error = float((ours - theirs).abs().max()) / top
            assert error <= tolerance, f"{name} of {lengths}, {options}, heads {shape} is off by {error:.1e}"
            worst = max(worst, error)
    return f"{len(cases)} cases, {worst:.0e}"


def _run_attention(
    operation: Callable[..., Tensor], lengths: tuple[int, ...], shape: tuple[int, int, int], options: dict[str, Any],
    dtype: torch.dtype, device: str,
) -> list[Tensor]:  # fmt: skip
    """[output, dq, dk, dv, and dbias where there is one]."""
    heads, groups, size = shape
    draw = torch.Generator().manual_seed(sum(lengths))
    tokens, longest = sum(lengths), max(lengths)
    made = [
        torch.randn(tokens, count, size, generator=draw).to(device, dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    if options.get("bias"):
        bias = torch.randn(heads, 2 * longest - 1, generator=draw).to(device, dtype).requires_grad_()
        options["bias"] = bias
        made.append(bias)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    out = operation(*made[:3], bounds, longest, **options)
    assert out.shape == made[0].shape and out.dtype == dtype, f"the output is {tuple(out.shape)} {out.dtype}"
    weights = torch.randn(out.shape, generator=draw).to(device, dtype)
    torch.autograd.backward((out * weights).sum())
    assert all(leaf.grad is not None for leaf in made), "a gradient is missing"
    return [out.detach(), *(leaf.grad for leaf in made if leaf.grad is not None)]


BOTH = ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 50.0},
    {"scale": 1.0, "similarity": "dot"},
    {"directions": BOTH},
    {"directions": BOTH, "partition_mode": "per_direction"},
    {"directions": ALL},
    {"offset": 3, "rows": 4},
    {"directions": ALL, "offset": 3, "rows": 4},
    {"directions": BOTH, "partition_mode": "per_direction", "hardness_mode": "all_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, "offset": 1, "rows": 6},
)


def tiled_infonce(found: Any, expected: Any, dtype: torch.dtype, device: str, tolerance: float) -> str:
    """Losses and gradients for every direction and weighting of negatives, with a tile of 1 KiB, so of several."""
    worst = 0.0
    cases = list(itertools.product(((1, 1, 8), (7, 1, 24), (40, 1, 16), (33, 3, 5)), LOSSES))
    for (rows, columns, size), chosen in cases:
        options = dict(chosen)
        if options.get("rows") is not None and rows < 7:
            options["offset"], options["rows"] = 0, rows
        mine, reference = (
            _run_infonce(operation, rows, columns, size, options, dtype, device) for operation in (found, expected)
        )
        # The gradients of all embeddings together, since those of one text may be zero; the losses for themselves.
        for what, ours, theirs in (
            ("the loss", mine[0], reference[0]),
            ("the gradient", torch.cat(mine[1:]), torch.cat(reference[1:])),
        ):
            error = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-3)
            assert error <= tolerance, f"{what} of {rows} x {columns} x {size}, {options} is off by {error:.1e}"
            worst = max(worst, error)
    return f"{len(cases)} cases, {worst:.0e}"


def _run_infonce(
    operation: Callable[..., Tensor], rows: int, columns: int, size: int, options: dict[str, Any], dtype: torch.dtype,
    device: str,
) -> list[Tensor]:  # fmt: skip
    """[losses, gradient of the queries, of each column of documents]."""
    draw = torch.Generator().manual_seed(rows)
    texts = [torch.randn(rows, size, generator=draw).to(device, dtype).requires_grad_() for _ in range(columns + 1)]
    losses = operation(texts[0], texts[1:], tile_bytes=1024, **options)
    count = options.get("rows") or rows
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.shape == (count,) and losses.dtype == wide, f"the losses are {tuple(losses.shape)} {losses.dtype}"
    weights = torch.rand(count, generator=draw).to(device, wide)
    torch.autograd.backward((losses * weights).sum())
    assert all(text.grad is not None for text in texts), "a gradient is missing"
    return [losses.detach(), *(text.grad.to(wide) for text in texts if text.grad is not None)]


def rounded_adamw(found: Any, expected: Any, dtype: torch.dtype, device: str, tolerance: float) -> str:
    """Weights and moments after two steps, for gradients and moments of both dtypes and weights of odd sizes.

    Both take the same random numbers, so that all but a few are equal: a result that lies where a random number decides
    may fall to the other side of it by its last bit in float32.
    """
    shapes = ((1,), (5,), (33, 7), (1024,), (1025, 3), (2, 2, 2048))
    kinds = (torch.bfloat16, torch.float32)
    worst, cases = 0.0, list(itertools.product(kinds, kinds, (0.0, 0.1)))
    for gradients, moments, decay in cases:
        mine, plain = (_run_adamw(one, shapes, gradients, moments, decay, device) for one in (found, expected))
        for ours, theirs in zip(mine, plain, strict=True):
            apart = (ours - theirs).abs()
            far = float((apart > theirs.abs() * tolerance).float().mean())
            assert far <= 0.005, f"{far:.1%} of the numbers are not the plain version's ({gradients}, {moments})"
            # Neighbours in bfloat16 are 2^-7 of their size apart, or less, and there are two steps.
            assert bool((apart <= theirs.abs() * 2**-6 + 1e-30).all()), "a number is far from the plain version's"
            worst = max(worst, far)
    return f"{len(cases)} cases, {worst:.1%} apart"


def _run_adamw(
    operation: Callable[..., None], shapes: Sequence[tuple[int, ...]], gradients: torch.dtype, moments: torch.dtype,
    decay: float, device: str,
) -> list[Tensor]:  # fmt: skip
    """[all weights, all first moments, all second moments], float64."""
    draw = torch.Generator().manual_seed(0)

    def made(scale: float, kind: torch.dtype) -> list[Tensor]:
        return [(torch.randn(shape, generator=draw) * scale).to(device, kind) for shape in shapes]

    weights, means = made(0.05, torch.bfloat16), made(0.1, moments)
    squares = [value.abs() for value in made(0.1, moments)]
    start = torch.cat([weight.flatten() for weight in weights]).clone()
    for step in (1, 2):
        keys = [(step * 2**62 + place * 2**33 + 2**31 + place) % 2**64 for place in range(len(shapes))]
        numbers = {"step": step, "rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "decay": decay}
        operation(weights, made(0.1, gradients), means, squares, keys, **numbers)
    results = [torch.cat([value.flatten() for value in some]) for some in (weights, means, squares)]
    assert (results[0] != start).float().mean() > 0.5, "hardly a weight has moved: nothing would be proved"
    return [value.double() for value in results]


def gather_rows(found: Any, expected: Any, dtype: torch.dtype, device: str, tolerance: float) -> str:
    """Rows of floating, 8-bit and 4-bit tables, for even and odd numbers of rows, some of them asked for twice."""
    worst = 0.0
    cases = list(
        itertools.product((1, 7, 129), (32, 96, 384), ("floating", "8bit", "4bit"), (torch.int32, torch.int64))
    )
    for count, width, kind, whole in cases:
        table = [part.to(device) for part in _table(width, kind, dtype)]
        ids = (torch.arange(count) * 7 % 50).to(device, whole)
        ours, theirs = (operation(ids, *table, dtype=dtype) for operation in (found, expected))
        assert ours.shape == (count, width) and ours.dtype == dtype, f"the rows are {tuple(ours.shape)} {ours.dtype}"
        error = float((ours - theirs).abs().max()) / float(theirs.abs().max())
        assert error <= tolerance, f"{count} rows of {width}, {kind}, are off by {error:.1e}"
        worst = max(worst, error)
    return f"{len(cases)} cases, {worst:.0e}"


def _table(width: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """A table of 50 rows with what goes with it."""
    draw = torch.Generator().manual_seed(width)
    scales = torch.rand(50, -(-width // 64), generator=draw) + 0.1
    if kind == "8bit":
        return [torch.randint(-127, 128, (50, width), generator=draw, dtype=torch.int8), scales]
    if kind == "4bit":
        pairs = torch.randint(0, 256, (50, width // 2), generator=draw, dtype=torch.uint8)
        return [pairs, scales, torch.randn(16, generator=draw)]
    return [torch.randn(50, width, generator=draw).to(dtype)]


OPERATIONS: dict[str, Callable[..., str]] = {
    "packed_attention": packed_attention, "tiled_infonce": tiled_infonce, "rounded_adamw": rounded_adamw,
    "gather_rows": gather_rows,
}  # fmt: skip


def check_operation(
    operation: str, kernel: str, *, plugins: Sequence[str] | None = None, dtype: torch.dtype = torch.float64,
    device: str = "cpu", tolerance: float = 1e-5,
) -> str:  # fmt: skip
    """An implementation by name against the plain one.

    Raises:
        ConfigError: If there is no such operation, or no such implementation.
        AssertionError: If they differ.
    """
    if operation not in OPERATIONS:
        fix = f"Known: {', '.join(OPERATIONS)}"
        raise ConfigError(f"there is no check for the operation {operation!r}", where="operation", fix=fix)
    specs = {
        spec.name: spec
        for plugin in registry(plugins).claimants("operation", operation)
        for spec in offers(plugin, "burnish_register_kernels", KernelSpec, plugins)
        if spec.operation == operation
    }
    if kernel not in specs:
        fix = f"Known: {', '.join(sorted(specs))}"
        raise ConfigError(f"{operation} has no implementation {kernel!r}", where="kernel", fix=fix)
    plain = next(
        spec
        for plugin in registry(()).claimants("operation", operation)
        for spec in offers(plugin, "burnish_register_kernels", KernelSpec, ())
        if spec.operation == operation and spec.priority == 0
    )
    assert specs[kernel].load is not plain.load, "this is the plain implementation itself: nothing would be proved"
    return OPERATIONS[operation](specs[kernel].load(), plain.load(), dtype, device, tolerance)
