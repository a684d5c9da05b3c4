"""Sentence Transformers' losses made to run tiled: the same loss and gradients, on the instances meant, and undone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import (
    cached_multiple_negatives_ranking,
    multiple_negatives_ranking,
)
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from torch import Tensor, nn

from burnish.core import tiled_loss
from burnish.core.errors import PatchError
from burnish.core.machine import describe
from burnish.core.registry import registry
from burnish.core.selection import choose_kernel
from burnish.core.tiled_loss import tile
from burnish.kernels.infonce import tiled_infonce

# Deprecated in newer releases in favour of an option of MultipleNegativesRankingLoss; users still have them.
pytestmark = pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")

MODEL: Any = nn.Sequential(nn.Identity())
GTE = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("MultipleNegativesRankingLoss", {}, 3),
    "dot": ("MultipleNegativesRankingLoss", {"similarity_fct": dot_score, "scale": 1.0}, 1),
    "all directions": ("MultipleNegativesRankingLoss", GTE, 2),
    "hardness": ("MultipleNegativesRankingLoss", {"hardness_mode": "all_negatives", "hardness_strength": 5.0}, 2),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", {}, 1),
    "cached": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5}, 3),
    "cached, all": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5, **GTE, "scale": 7.0}, 2),
    "cached symmetric": ("CachedMultipleNegativesSymmetricRankingLoss", {"mini_batch_size": 5}, 1),
}


def make(case: str) -> tuple[Any, list[Tensor]]:
    """(the loss, embeddings for it)."""
    name, options, columns = CASES[case]
    draw = torch.Generator().manual_seed(1)
    embeddings = [torch.randn(17, 8, generator=draw, dtype=torch.float64) for _ in range(columns + 1)]
    return getattr(losses, name)(MODEL, **options), embeddings


def run(loss: Any, embeddings: Sequence[Tensor]) -> list[Tensor]:
    """[the loss, the gradient of each column], whichever way the loss takes its embeddings."""
    leaves = [values.clone().requires_grad_() for values in embeddings]
    if isinstance(loss, losses.CachedMultipleNegativesRankingLoss):
        value = loss.calculate_loss([list(torch.split(leaf, 5)) for leaf in leaves], None, with_backward=True)
        assert not value.requires_grad
    else:
        value = loss.compute_loss_from_embeddings(leaves, torch.empty(0))
        torch.autograd.backward(value)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves) and all(float(grad.abs().max()) > 1e-6 for grad in gradients)
    return [value.detach(), *gradients]


class Counted:
    """The operation, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        return tiled_infonce(*args, **options, tile_bytes=256)


@pytest.mark.parametrize("case", CASES)
def test_large_batches_are_the_same_tiled(case: str) -> None:
    loss, embeddings = make(case)
    expected, operation = run(loss, embeddings), Counted()
    undo = tile(loss, operation, least_scores=0)
    assert type(loss).__name__ in undo.names
    found = run(loss, embeddings)
    assert operation.calls == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_small_batches_are_computed_as_before_bit_for_bit(case: str) -> None:
    loss, embeddings = make(case)
    expected, operation = run(loss, embeddings), Counted()
    scores = 17 * 17 * {"plain": 3, "hardness": 2, "cached": 3, "all directions": 6, "cached, all": 6}.get(case, 1)
    scores *= 2 if "symmetric" in case else 1
    for least, calls in ((scores + 1, 0), (scores, 1)):
        undo = tile(loss, operation, least)
        found = run(loss, embeddings)
        assert operation.calls == calls
        assert calls or all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        undo()


class OwnComputation(losses.MultipleNegativesRankingLoss):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return 2 * super().compute_loss_from_embeddings(embeddings, labels)


class OwnCached(losses.CachedMultipleNegativesRankingLoss):
    def calculate_loss(self, *args: Any, **options: Any) -> Tensor:
        return 2 * super().calculate_loss(*args, **options)


class OnlyNamed(losses.MultipleNegativesRankingLoss):
    """A subclass without a computation of its own."""


def test_what_computes_otherwise_is_left_alone() -> None:
    operation = Counted()
    assert tile(OnlyNamed(MODEL), operation, 0).names == ("OnlyNamed",)
    for loss in (
        OwnComputation(MODEL),
        losses.MultipleNegativesRankingLoss(MODEL, similarity_fct=euclidean_sim),
        losses.CachedMultipleNegativesRankingLoss(MODEL, similarity_fct=lambda a, b: cos_sim(a, b)),
        losses.TripletLoss(MODEL),
    ):
        assert tile(loss, operation, 0).names == ()
    # Its inner loss is tiled, but nothing reads that: the class's own method goes on to Sentence Transformers'.
    own = OwnCached(MODEL)
    embeddings = make("cached")[1]
    expected = run(own, embeddings)
    assert tile(own, operation, 0).names == ("MultipleNegativesRankingLoss",)
    assert all(torch.equal(*pair) for pair in zip(run(own, embeddings), expected, strict=True))
    assert operation.calls == 0


def test_a_similarity_set_later_is_honoured() -> None:
    loss, embeddings = make("plain")
    operation = Counted()
    tile(loss, operation, 0)
    loss.similarity_fct, loss.scale = euclidean_sim, 2.0
    found = run(loss, embeddings)
    plain = losses.MultipleNegativesRankingLoss(MODEL, 2.0, euclidean_sim)
    assert operation.calls == 0 and torch.equal(found[0], run(plain, embeddings)[0])
    loss.similarity_fct = dot_score
    found = run(loss, embeddings)
    expected = run(losses.MultipleNegativesRankingLoss(MODEL, 2.0, dot_score), embeddings)
    assert operation.calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_undone_it_is_as_it_was() -> None:
    for case in CASES:
        loss, embeddings = make(case)
        before, operation = set(vars(loss)), Counted()
        undo = tile(loss, operation, 0)
        again = tile(loss, operation, 0)
        assert set(vars(loss)) - before and again.names == ()
        undo()
        undo()
        assert set(vars(loss)) == before and undo.names == ()
        run(loss, embeddings)
        assert operation.calls == 0


def test_undo_takes_off_only_its_own() -> None:
    loss = make("plain")[0]
    undo = tile(loss, Counted(), 0)
    loss.compute_loss_from_embeddings = other = lambda *_: None
    with pytest.raises(PatchError, match="MultipleNegativesRankingLoss: its compute_loss_from_embeddings is not"):
        undo()
    assert loss.compute_loss_from_embeddings is other


def test_a_copy_computes_with_its_own_settings() -> None:
    loss, embeddings = make("plain")
    tile(loss, tiled_infonce, 0)
    other = copy.deepcopy(loss)
    other.scale = 3.0
    found = run(other, embeddings)
    expected = run(losses.MultipleNegativesRankingLoss(MODEL, 3.0), embeddings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gathered_texts_are_scored_from_this_process_on(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three processes: the others' texts are in front of its own and behind them."""
    loss, embeddings = make(case)
    draw = torch.Generator().manual_seed(2)
    others = [torch.randn(2, 17, 8, generator=draw, dtype=torch.float64) for _ in embeddings]
    gathered: list[Tensor] = []

    def gather(column: Tensor) -> Tensor:
        first, last = others[len(gathered) % len(others)]
        gathered.append(column)
        return torch.cat([first, column, last])

    for module in (multiple_negatives_ranking, cached_multiple_negatives_ranking, tiled_loss):
        monkeypatch.setattr(module, "all_gather_with_grad", gather)
        monkeypatch.setattr(module, "get_rank", lambda: 1)
    alone = run(loss, embeddings)
    loss.gather_across_devices = True
    expected = run(loss, embeddings)
    assert not torch.allclose(alone[0], expected[0])
    tile(loss, operation := Counted(), 0)
    found = run(loss, embeddings)
    assert operation.calls == 1 and len(gathered) == 2 * len(embeddings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "cached", "matryoshka", "matryoshka on cached"])
def test_on_a_real_model(name: str, minilm: Path) -> None:
    model = SentenceTransformer(str(minilm), device="cpu").double().eval()
    kernel = choose_kernel(registry(), describe("cpu"), "tiled_infonce")
    assert kernel is not None and kernel.load() is tiled_infonce
    kind: Any = losses.CachedMultipleNegativesRankingLoss if "cached" in name else losses.MultipleNegativesRankingLoss
    inner = kind(model, **({"mini_batch_size": 2} if "cached" in name else {}))
    loss = losses.MatryoshkaLoss(model, inner, [384, 64]) if "matryoshka" in name else inner
    columns = (["a cat", "two dogs", "the sea"], ["kitten", "puppies", "water and salt"], ["no", "not", "never"])

    def step() -> list[Tensor]:
        model.zero_grad()
        value = loss([model.preprocess(list(column)) for column in columns], torch.empty(0))
        torch.autograd.backward(value)
        return [value.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    expected, operation = step(), Counted()
    assert len(expected) > 90 and float(expected[1].abs().max()) > 1e-6
    undo = tile(loss, operation, 0)
    found = step()
    # MatryoshkaLoss has bound a computation of its own to a cached loss, and that is left alone.
    assert operation.calls == {"plain": 1, "cached": 1, "matryoshka": 2, "matryoshka on cached": 0}[name]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    undo()
    assert len(step()) == len(expected)
