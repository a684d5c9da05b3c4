"""Losses of classifiers: transformers' own for each problem_type, torch's with weights, the paper's with a focus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from burnish import FastClassifier
from burnish.core.class_losses import (
    MULTI,
    REGRESSION,
    SINGLE,
    ClassLoss,
    CrossEntropyLoss,
    FocalLoss,
    MultiLabelLoss,
    RegressionLoss,
    balanced_pos_weights,
    default_loss,
)
from burnish.core.errors import ConfigError, DataError

from .crossing import PAIRS, make

A, B = (list(texts) for texts in zip(*(pair for pair in PAIRS if pair[0]), strict=True))
COUNT = len(A)
LABELS: dict[str, Tensor] = {
    SINGLE: torch.arange(COUNT) % 3,
    MULTI: (torch.arange(3 * COUNT).view(COUNT, 3) % 4 < 2).float(),
    REGRESSION: torch.linspace(-1, 1, 3 * COUNT, dtype=torch.float64).view(COUNT, 3),
}


def load(folder: str, problem: Any) -> Any:
    model = FastClassifier.from_pretrained(
        folder, full_finetuning=True, num_labels=3, problem_type=problem, device="cpu"
    )  # fmt: skip
    return model.double().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make("bert", tmp_path_factory.mktemp("bert"), 3)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_the_default_is_what_transformers_computes(problem: str, pairs: bool, folder: str) -> None:
    model = load(folder, problem)
    columns = [A, B] if pairs else [A]
    found = default_loss(model)(columns, LABELS[problem])
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, problem_type=problem, num_labels=3, attn_implementation="eager"
    )
    plain = plain.double().eval()
    batch = AutoTokenizer.from_pretrained(folder)(*columns, padding=True, truncation=True, return_tensors="pt")
    wanted = plain(**batch, labels=LABELS[problem].double() if problem == MULTI else LABELS[problem]).loss
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    theirs = gradients(plain, wanted)
    ours = {name.removeprefix("0.model."): value for name, value in gradients(model, found).items()}
    assert ours.keys() == theirs.keys() and float(theirs["classifier.weight"].abs().max()) > 1e-3
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


def loss_of(kind: type[ClassLoss], folder: str, problem: str = SINGLE, **settings: Any) -> ClassLoss:
    return kind(load(folder, problem), **settings)


LOGITS = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
SEVERAL = (torch.arange(27).view(9, 3) % 5 < 2).double()
WEIGHTS = [0.5, 1.0, 4.0]


def test_weights_and_smoothing_are_torchs(folder: str) -> None:
    given = torch.tensor(WEIGHTS, dtype=torch.float64)
    found = loss_of(CrossEntropyLoss, folder, class_weights=WEIGHTS, label_smoothing=0.1).value(LOGITS, CLASSES)
    torch.testing.assert_close(found, functional.cross_entropy(LOGITS, CLASSES, given, label_smoothing=0.1))
    assert abs(float(found - functional.cross_entropy(LOGITS, CLASSES))) > 1e-2
    several = loss_of(MultiLabelLoss, folder, MULTI, pos_weight=WEIGHTS).value(LOGITS, SEVERAL)
    wanted = functional.binary_cross_entropy_with_logits(LOGITS, SEVERAL, pos_weight=given)
    torch.testing.assert_close(several, wanted)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focus_is_the_papers_formula(weights: Any, folder: str) -> None:
    loss = loss_of(FocalLoss, folder, gamma=2.0, class_weights=weights)
    logits = LOGITS.clone().requires_grad_()
    p = logits.softmax(dim=1)[torch.arange(9), CLASSES]
    alpha = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)[CLASSES]
    wanted = -(alpha * (1 - p) ** 2 * p.log()).sum() / alpha.sum()
    torch.testing.assert_close(loss.value(logits, CLASSES), wanted)
    (reference,) = torch.autograd.grad(wanted, logits)
    (ours,) = torch.autograd.grad(loss.value(logits, CLASSES), logits)
    assert float(reference.abs().max()) > 1e-3
    torch.testing.assert_close(ours, reference)


def test_focus_on_several_labels_is_the_papers_formula(folder: str) -> None:
    loss = loss_of(FocalLoss, folder, MULTI, gamma=1.5, class_weights=WEIGHTS)
    p = LOGITS.sigmoid()
    alpha = torch.tensor(WEIGHTS, dtype=torch.float64)
    yes, no = alpha * (1 - p) ** 1.5 * p.log(), p**1.5 * (1 - p).log()
    torch.testing.assert_close(loss.value(LOGITS, SEVERAL), -(SEVERAL * yes + (1 - SEVERAL) * no).mean())


def test_without_focus_it_is_the_plain_loss(folder: str) -> None:
    single = loss_of(FocalLoss, folder, gamma=0.0, class_weights=WEIGHTS).value(LOGITS, CLASSES)
    weighted = loss_of(CrossEntropyLoss, folder, class_weights=WEIGHTS).value(LOGITS, CLASSES)
    torch.testing.assert_close(single, weighted)
    several = loss_of(FocalLoss, folder, MULTI, gamma=0.0).value(LOGITS, SEVERAL)
    torch.testing.assert_close(several, functional.binary_cross_entropy_with_logits(LOGITS, SEVERAL))


def test_focus_stays_finite_where_a_text_is_certain(folder: str) -> None:
    logits = torch.tensor([[80.0, 0.0, -80.0], [-80.0, 0.0, 80.0]], requires_grad=True)
    for loss, labels in (
        (loss_of(FocalLoss, folder, gamma=0.5), torch.tensor([0, 0])),
        (loss_of(FocalLoss, folder, MULTI, gamma=0.5), torch.tensor([[1.0, 0, 0], [1, 0, 0]])),
    ):
        value = loss.value(logits, labels)
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value) and torch.isfinite(gradient).all() and gradient.abs().max() > 0.01


def test_balanced_weights_are_scikit_learns(folder: str) -> None:
    loss = loss_of(CrossEntropyLoss, folder, class_weights="balanced")
    assert loss.waits
    with pytest.raises(ConfigError, match="class_weights='balanced': no data was counted"):
        loss([A], LABELS[SINGLE])
    loss.count(CLASSES)
    assert loss.weights is not None and not loss.waits
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=CLASSES.numpy())
    np.testing.assert_allclose(loss.weights.numpy(), wanted, rtol=1e-6)
    with pytest.raises(DataError, match="class 2 has no text"):
        loss.count([0, 1, 1])
    np.testing.assert_allclose(balanced_pos_weights([[1, 0], [1, 1], [0, 1], [0, 1]]), [1, 1 / 3])
    with pytest.raises(DataError, match="no text has label 1"):
        balanced_pos_weights([[1, 0], [1, 0]])


@pytest.mark.parametrize(
    ("kind", "problem", "settings", "said"),
    [
        (CrossEntropyLoss, SINGLE, {"class_weights": [1.0, 2.0]}, "2 weights for 3 classes"),
        (CrossEntropyLoss, SINGLE, {"class_weights": [1.0, 0.0, 2.0]}, "0 is not a positive number"),
        (CrossEntropyLoss, SINGLE, {"class_weights": "even"}, "'even' is unknown"),
        (CrossEntropyLoss, SINGLE, {"label_smoothing": 1.0}, "label_smoothing: 1.0 is out of range"),
        (FocalLoss, SINGLE, {"gamma": -1.0}, "gamma: -1.0 is out of range"),
        (MultiLabelLoss, SINGLE, {}, "Use CrossEntropyLoss or FocalLoss"),
        (CrossEntropyLoss, MULTI, {}, "Use MultiLabelLoss or FocalLoss"),
        (FocalLoss, REGRESSION, {}, "Use RegressionLoss"),
    ],
)
def test_settings_that_cannot_be(kind: Any, problem: str, settings: Any, said: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loss_of(kind, folder, problem, **settings)


def test_three_columns_are_no_text(folder: str) -> None:
    with pytest.raises(DataError, match="CrossEntropyLoss: 3 text columns"):
        loss_of(CrossEntropyLoss, folder)([A, B, A], LABELS[SINGLE])
    smoothed = default_loss(load(folder, SINGLE), 0.2)
    assert isinstance(smoothed, CrossEntropyLoss) and smoothed.label_smoothing == 0.2
    assert isinstance(default_loss(load(folder, REGRESSION)), RegressionLoss)
    with pytest.raises(ConfigError, match="label_smoothing_factor: the model's problem_type is regression"):
        default_loss(load(folder, REGRESSION), 0.2)


def test_the_dtype_of_weights_follows_the_logits(folder: str, tmp_path: Path) -> None:
    loss = loss_of(CrossEntropyLoss, folder, class_weights=WEIGHTS)
    assert loss.value(LOGITS, CLASSES).dtype == torch.float64
    assert loss.value(LOGITS.bfloat16(), CLASSES).dtype == torch.bfloat16
    assert "weights" not in loss.state_dict()
