"""Tiled InfoNCE against Sentence Transformers' dense loss: every variant, gradients, dtypes, and what is never held."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.core.testing.operations import OPERATIONS
from burnish.kernels.infonce import (
    DIRECTIONS,
    HARDNESS_MODES,
    _tile_shape,
    tiled_infonce,
    tiled_logsumexp,
    tiled_logsumexps,
)

BOTH = ("query_to_doc", "doc_to_query")
SIMILARITIES = {"cosine": cos_sim, "dot": dot_score}
PARTITIONS = (
    (("query_to_doc",), "joint"),
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "query_to_query"), "joint"),
    (("query_to_doc", "doc_to_query"), "joint"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
    (DIRECTIONS, "joint"),
)


def texts(rows: int, columns: int, size: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, then each column of documents."""
    draw = torch.Generator().manual_seed(rows)
    return [0.7 * torch.randn(rows, size, generator=draw, dtype=torch.float64).to(dtype) for _ in range(columns + 1)]


def dense(embeddings: list[Tensor], *, scale: float = 20.0, similarity: str = "cosine", **options: Any) -> Tensor:
    model: Any = None
    loss = losses.MultipleNegativesRankingLoss(model, scale, SIMILARITIES[similarity], **options)
    return loss.compute_loss_from_embeddings(embeddings, torch.empty(0))


def tiled(embeddings: list[Tensor], **options: Any) -> Tensor:
    return tiled_infonce(embeddings[0], embeddings[1:], **options).mean()


def run(operation: Callable[..., Tensor], embeddings: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(the loss, the gradients of all embeddings)."""
    leaves = [values.clone().requires_grad_() for values in embeddings]
    loss = operation(leaves, **options)
    torch.autograd.backward(loss)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return loss.detach(), torch.stack(gradients)


def apart(found: Tensor, expected: Tensor) -> float:
    assert float(expected.abs().max()) > 1e-6
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("hardness", HARDNESS_MODES, ids=str)
@pytest.mark.parametrize("directions, partition", PARTITIONS, ids=str)
def test_equals_the_dense_loss(
    directions: tuple[str, ...], partition: str, hardness: str | None, similarity: str, dtype: torch.dtype, bound: float
) -> None:
    options: dict[str, Any] = {"directions": directions, "partition_mode": partition, "similarity": similarity}
    options |= {"hardness_mode": hardness, "hardness_strength": 3.0 if hardness else 0.0, "scale": 5.0}
    for rows, columns in ((1, 3), *itertools.product((2, 37), (1, 3))):
        embeddings = texts(rows, columns, dtype=dtype)
        expected, ours = run(dense, embeddings, **options), run(tiled, embeddings, tile_bytes=1024, **options)
        assert apart(ours[0], expected[0]) <= bound and apart(ours[1], expected[1]) <= bound
        assert ours[0].dtype == ours[1].dtype == dtype


@pytest.mark.parametrize("directions, partition", PARTITIONS, ids=str)
def test_one_pair_alone(directions: tuple[str, ...], partition: str) -> None:
    """It has no negatives, so that whole rows are left out: gradients of zero, and numbers."""
    options: dict[str, Any] = {"directions": directions, "partition_mode": partition}
    expected, ours = (run(operation, texts(1, 1), **options) for operation in (dense, tiled))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_every_option_changes_the_loss() -> None:
    """Otherwise the comparison above would not show that it is honoured."""
    embeddings = texts(37, 3)
    variants: list[dict[str, Any]] = [{"directions": chosen, "partition_mode": mode} for chosen, mode in PARTITIONS]
    variants[1] = {"similarity": "dot"}  # in one direction the two partitions are one
    variants += [{"hardness_mode": mode, "hardness_strength": 3.0} for mode in HARDNESS_MODES if mode]
    variants += [{"scale": 19.0}]
    found = {round(float(tiled(embeddings, **options)), 9) for options in variants}
    assert len(found) == len(variants)


@pytest.mark.parametrize("hardness", HARDNESS_MODES, ids=str)
@pytest.mark.parametrize("directions", [("query_to_doc",), DIRECTIONS], ids=len)
def test_rows_are_those_of_the_whole_batch(directions: tuple[str, ...], hardness: str | None) -> None:
    """What one of several processes computes, with everybody's embeddings, is its part of the whole."""
    embeddings = texts(21, 2)
    options: dict[str, Any] = {"directions": directions, "hardness_mode": hardness, "hardness_strength": 2.0}
    whole = tiled_infonce(embeddings[0], embeddings[1:], **options)
    parts = [
        tiled_infonce(embeddings[0], embeddings[1:], offset=first, rows=7, tile_bytes=512, **options)
        for first in (0, 7, 14)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    embeddings = texts(19, 1)
    options: dict[str, Any] = {"scale": 3000.0, "directions": DIRECTIONS}
    expected = run(dense, embeddings, **options)
    ours = run(tiled, [values.float() for values in embeddings], tile_bytes=256, **options)
    assert torch.isfinite(ours[1]).all() and apart(ours[0], expected[0]) < 1e-5


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_half_precision_is_computed_in_float32(similarity: str) -> None:
    halves = texts(40, 2, dtype=torch.bfloat16)
    exact = run(tiled, [values.double() for values in halves], similarity=similarity)
    ours = run(tiled, halves, similarity=similarity, tile_bytes=2048)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert apart(ours[0], exact[0]) < 1e-6
    assert apart(ours[1], exact[1]) < 2**-8  # rounded once, at the end


def test_autocast_changes_nothing() -> None:
    embeddings = texts(40, 1, dtype=torch.float32)
    expected = run(tiled, embeddings, directions=DIRECTIONS)
    with torch.autocast("cpu", torch.bfloat16):  # the dense loss multiplies in bfloat16 here
        ours = run(tiled, embeddings, directions=DIRECTIONS)
        other = run(dense, embeddings, directions=DIRECTIONS)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert apart(other[0], expected[0]) > 1e-5


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    embeddings = texts(9, 1)
    expected = run(dense, embeddings, directions=DIRECTIONS)[1]
    leaves = [values.clone().requires_grad_(place != frozen) for place, values in enumerate(embeddings)]
    torch.autograd.backward(tiled(leaves, directions=DIRECTIONS))
    found = leaves[1 - frozen].grad
    assert leaves[frozen].grad is None and found is not None
    torch.testing.assert_close(found, expected[1 - frozen], rtol=1e-12, atol=1e-12)


class NoMatrix(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where a tensor of so many elements comes up; counts what it has seen."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.seen = elements, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.seen += 1
                assert value.numel() < self.elements, f"{function} made {tuple(value.shape)}"
        return out


def test_no_matrix_of_scores_is_held() -> None:
    embeddings = texts(512, 2, 8, torch.float32)
    options: dict[str, Any] = {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 1.0}
    with NoMatrix(2 * 128 * 128) as mode:  # an eighth of the scores of one column
        run(tiled, embeddings, tile_bytes=4 * 128 * 128, **options)
    assert mode.seen > 1000
    with pytest.raises(AssertionError, match="made"), NoMatrix(512 * 512):
        run(dense, embeddings, **options)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products of matrices."""

    seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options, products",
    [
        ({}, 4),
        ({"directions": BOTH}, 4),
        ({"directions": BOTH, "partition_mode": "per_direction"}, 4),
        ({"directions": BOTH, "hardness_mode": "hard_negatives", "hardness_strength": 1.0}, 4),
        ({"directions": BOTH, "hardness_mode": "all_negatives", "hardness_strength": 1.0}, 8),
        ({"directions": BOTH, "offset": 1, "rows": 8}, 8),
        ({"directions": DIRECTIONS}, 12),
    ],
    ids=str,
)
def test_two_directions_share_their_products(options: dict[str, Any], products: int) -> None:
    with Products() as mode:  # type: ignore[no-untyped-call]
        run(tiled, texts(9, 1), **options)
    assert mode.seen == products


def test_only_a_number_a_row_is_kept_for_the_backward() -> None:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows, columns = (values.requires_grad_() for values in texts(300, 1, 8))
    for numbers, operation in (
        (300, lambda: tiled_logsumexp(rows, columns, factor=1.0, slope=1.0)),
        (600, lambda: tiled_logsumexps(rows, columns, factor=1.0)),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            operation()
        assert sum(kept.values()) == (2 * 300 * 8 + numbers) * 8


@pytest.mark.parametrize("rows, columns, cells", [(5, 5, 1), (5, 500, 100), (500, 5, 100), (64, 64, 64), (1, 1, 9)])
def test_a_tile_is_bounded_and_no_larger_than_the_matrix(rows: int, columns: int, cells: int) -> None:
    height, width = _tile_shape(rows, columns, cells)
    assert 1 <= height <= rows and 1 <= width <= columns and height * width <= cells
    assert height * width > min(cells, rows * columns) // 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo instantiates it
def test_it_is_one_graph_under_compile() -> None:
    """No number is asked of the device and no shape depends on one: Dynamo would break the graph there."""
    embeddings = texts(8, 1)
    options: dict[str, Any] = {"directions": DIRECTIONS, "tile_bytes": 256}
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    expected, found = run(tiled, embeddings, **options), run(compiled, embeddings, **options)
    assert apart(found[0], expected[0]) < 1e-12 and apart(found[1], expected[1]) < 1e-12


def other_implementation(queries: Tensor, documents: list[Tensor], *, offset: int = 0, rows: int | None = None,
                         tile_bytes: int = 0, forget: str = "", **options: Any) -> Tensor:  # fmt: skip
    """The dense loss in the operation's form, each query's for itself; without the option that it forgets."""
    options.pop(forget, None)
    count = queries.shape[0] if rows is None else rows
    each = [tiled_infonce(queries, documents, offset=place, rows=1, **options) for place in range(queries.shape[0])]
    return torch.cat(each)[offset : offset + count]


def test_the_conformance_check_passes_what_is_right_and_only_that() -> None:
    check = OPERATIONS["tiled_infonce"]
    assert "44 cases" in check(other_implementation, tiled_infonce, torch.float64, "cpu", 1e-12)
    for option in ("scale", "similarity", "directions", "partition_mode", "hardness_mode"):
        with pytest.raises(AssertionError, match="is off by"):
            check(lambda *a, o=option, **k: other_implementation(*a, forget=o, **k), tiled_infonce,
                  torch.float64, "cpu", 1e-12)  # fmt: skip


@pytest.mark.parametrize(
    "options, words",
    [
        ({"directions": ("doc_to_query",)}, "query_to_doc is one of them"),
        ({"directions": ("query_to_doc", "sideways")}, "sideways"),
        ({"partition_mode": "each"}, "neither 'joint' nor 'per_direction'"),
        ({"directions": DIRECTIONS, "partition_mode": "per_direction"}, "score the positive"),
        ({"similarity": "euclidean"}, "neither 'cosine' nor 'dot'"),
        ({"hardness_mode": "soft"}, "hardness_mode='soft'"),
        ({"scale": 0.0}, "not positive"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiled(texts(3, 1), **options)
    with pytest.raises(ValueError, match="each must have the queries'"):
        tiled_infonce(torch.ones(3, 4), [torch.ones(2, 4)])
