"""Sentence Transformers' losses on packed input: loss and gradients equal to padded input, or padded on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from burnish import FastSentenceTransformer
from burnish.core.packing import PADDED_LOSSES, needs_padding

A = ["a cat", "dogs run far away", "the third", "x y z w v", "another one here", "six"]
B = ["kitten", "a very long sentence about dogs and what they do all day", "3", "letters", "again", "number six"]
C = ["no", "nope", "never ever", "not", "none of it", "nil"]
SCORES, BINARY, CLASSES = torch.linspace(0, 1, 6), torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
WIDTH = 384


def mnr(model: Any) -> nn.Module:
    return losses.MultipleNegativesRankingLoss(model)


CASES: dict[str, tuple[Callable[[Any], nn.Module], list[list[str]], Tensor | None]] = {
    "mnr": (mnr, [A, B, C], None),
    "cached mnr": (lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2), [A, B, C], None),
    "symmetric": (losses.MultipleNegativesSymmetricRankingLoss, [A, B], None),
    "cached symmetric": (
        lambda m: losses.CachedMultipleNegativesSymmetricRankingLoss(m, mini_batch_size=2), [A, B], None,
    ),
    "cosent": (losses.CoSENTLoss, [A, B], SCORES),
    "angle": (losses.AnglELoss, [A, B], SCORES),
    "cosine": (losses.CosineSimilarityLoss, [A, B], SCORES),
    "contrastive": (losses.ContrastiveLoss, [A, B], BINARY),
    "online contrastive": (losses.OnlineContrastiveLoss, [A, B], BINARY),
    "triplet": (losses.TripletLoss, [A, B, C], None),
    "batch all": (losses.BatchAllTripletLoss, [A], CLASSES),
    "batch hard": (losses.BatchHardTripletLoss, [A], CLASSES),
    "batch hard soft": (losses.BatchHardSoftMarginTripletLoss, [A], CLASSES),
    "batch semi-hard": (losses.BatchSemiHardTripletLoss, [A], CLASSES),
    "softmax": (lambda m: losses.SoftmaxLoss(m, WIDTH, 3), [A, B], CLASSES),
    "mse": (losses.MSELoss, [A], torch.linspace(-1, 1, 6 * WIDTH).view(6, WIDTH)),
    "margin mse": (losses.MarginMSELoss, [A, B, C], SCORES),
    "distil kl": (losses.DistillKLDivLoss, [A, B, C], torch.linspace(0, 1, 12).view(6, 2)),
    "matryoshka": (lambda m: losses.MatryoshkaLoss(m, mnr(m), [WIDTH, 128]), [A, B], None),
    "matryoshka 2d": (lambda m: losses.Matryoshka2dLoss(m, mnr(m), [WIDTH, 128]), [A, B], None),
    "adaptive layer": (lambda m: losses.AdaptiveLayerLoss(m, mnr(m)), [A, B], None),
    "mega batch": (lambda m: losses.MegaBatchMarginLoss(m, mini_batch_size=2), [A, B], None),
    "orthogonal": (losses.GlobalOrthogonalRegularizationLoss, [A, B], None),
}  # fmt: skip


def load(minilm: Path, *, packed: bool) -> Any:
    model = FastSentenceTransformer.from_pretrained(
        str(minilm), packed=packed, full_finetuning=True, device="cpu",
        config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2},
    )  # fmt: skip
    return model.train()


@pytest.fixture(scope="module")
def models(minilm: Path) -> dict[str, Any]:
    return {name: load(minilm, packed=name == "packed") for name in ("packed", "padded")}


def loss_and_gradients(model: Any, case: str) -> tuple[float, dict[str, Tensor]]:
    make, columns, labels = CASES[case]
    torch.manual_seed(0)
    random.seed(0)  # some losses draw a layer or a dimension
    model.zero_grad()
    features = [model.preprocess(column) for column in columns]
    assert ("cu_seq_lens_q" in features[0]) == (model.burnish.packed is not None)
    result = make(model)(features, labels)
    value: Tensor = torch.stack(list(result.values())).sum() if isinstance(result, dict) else result
    torch.autograd.backward(value)
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Deprecated in newer releases in favour of an option of MultipleNegativesRankingLoss; users still have them.
@pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded(models: dict[str, Any], case: str) -> None:
    ours, gradients = loss_and_gradients(models["packed"], case)
    plain, expected = loss_and_gradients(models["padded"], case)
    assert ours == pytest.approx(plain, abs=1e-5)
    assert expected and gradients.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-6
    size = torch.cat([value.flatten() for value in expected.values()]).norm()
    apart = torch.cat([(gradients[name] - expected[name]).flatten() for name in expected]).norm()
    assert apart <= 1e-4 * size


def test_every_loss_is_measured_or_padded() -> None:
    """A loss that a new Sentence Transformers brings must be looked at before packed input is right for it."""
    measured = {
        "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss",
        "CachedMultipleNegativesSymmetricRankingLoss", "CoSENTLoss", "AnglELoss", "CosineSimilarityLoss",
        "ContrastiveLoss", "OnlineContrastiveLoss", "TripletLoss", "BatchAllTripletLoss", "BatchHardTripletLoss",
        "BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss", "SoftmaxLoss", "MSELoss", "MarginMSELoss",
        "DistillKLDivLoss", "MatryoshkaLoss", "Matryoshka2dLoss", "AdaptiveLayerLoss", "MegaBatchMarginLoss",
        "GlobalOrthogonalRegularizationLoss",
    }  # fmt: skip
    # EmbedDistillLoss takes the teacher's embeddings as labels, as MSELoss does: it reads no token ids.
    known = measured | set(PADDED_LOSSES) | {"EmbedDistillLoss"}
    offered = {
        name for name in dir(losses)
        if isinstance(getattr(losses, name), type) and issubclass(getattr(losses, name), nn.Module)
    }  # fmt: skip
    assert offered - known == set()


def test_a_loss_inside_another_is_found(models: dict[str, Any]) -> None:
    model = models["padded"]
    guided = losses.MatryoshkaLoss(model, losses.GISTEmbedLoss(model, model), [WIDTH, 128])
    assert needs_padding(guided) == "GISTEmbedLoss: it hands the tokens to its guide model"
    assert needs_padding(mnr(model)) is None
