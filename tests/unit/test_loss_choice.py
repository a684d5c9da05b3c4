from __future__ import annotations

import inspect

import pytest

from burnish.core.columns import CLASSES, LABELLED_PAIRS, PAIRS, SCORED, default_loss
from burnish.core.errors import ConfigError
from burnish.core.loss_choice import _NEEDS, _OTHER_DATA, check_loss, find_loss

KINDS = {PAIRS: 2, SCORED: 2, LABELLED_PAIRS: 2, CLASSES: 1}


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_loss(name)
    return str(caught.value)


def test_every_loss_that_a_model_alone_makes_is_known() -> None:
    from sentence_transformers.sentence_transformer import losses
    from torch import nn

    classes = {key for key, value in vars(losses).items() if inspect.isclass(value) and issubclass(value, nn.Module)}
    assert set(_NEEDS) | set(_OTHER_DATA) <= classes, "a loss is gone from Sentence Transformers"
    assert not set(_NEEDS) & set(_OTHER_DATA)
    made: set[str] = set()
    for name in classes - set(_OTHER_DATA):
        try:
            assert find_loss(name) is getattr(losses, name)
        except ConfigError as error:
            assert "also needs `" in str(error)
        else:
            made.add(name)
    assert set(_NEEDS) <= made
    assert made <= set(_NEEDS), "say in loss_choice.py what this loss reads"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MultipleNegativeRankingLoss", "has no loss 'MultipleNegativeRankingLoss'. Did you mean 'MultipleNegatives"),
        ("cosentloss", "Did you mean 'CoSENTLoss'?"),
        ("zzz", "Sentence Transformers has no loss 'zzz'. Known: AnglELoss, BatchAllTripletLoss"),
        ("SiameseDistanceMetric", "has no loss 'SiameseDistanceMetric'"),
        ("GISTEmbedLoss", "GISTEmbedLoss also needs `guide`. Use it from Python, with burnish.Trainer"),
        ("MatryoshkaLoss", "MatryoshkaLoss also needs `loss` and `matryoshka_dims`."),
        ("MarginMSELoss", "MarginMSELoss needs a teacher's margins as labels. Use it from Python"),
    ],
)
def test_losses_that_a_run_cannot_use(name: str, message: str) -> None:
    assert refused(name).startswith("loss: ") and message in refused(name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_loss_fits_its_kind(kind: str) -> None:
    find_loss(default_loss(kind))
    check_loss(default_loss(kind), kind, KINDS[kind], "data.csv")


@pytest.mark.parametrize(
    ("name", "kind", "texts"),
    [
        ("MultipleNegativesRankingLoss", PAIRS, 7),
        ("MultipleNegativesSymmetricRankingLoss", PAIRS, 2),
        ("TripletLoss", PAIRS, 3),
        ("AnglELoss", PAIRS, 4),
        ("AnglELoss", SCORED, 2),
        ("CosineSimilarityLoss", LABELLED_PAIRS, 2),
        ("SomeLossOfTomorrow", CLASSES, 1),
    ],
)
def test_losses_that_fit(name: str, kind: str, texts: int) -> None:
    check_loss(name, kind, texts, "data.csv")


@pytest.mark.parametrize(
    ("name", "kind", "texts", "message"),
    [
        (
            "CoSENTLoss",
            PAIRS,
            2,
            "CoSENTLoss needs two texts and a score, or two texts and a label of 0 or 1, and data.",
        ),
        (
            "OnlineContrastiveLoss",
            SCORED,
            2,
            "needs two texts and a label of 0 or 1, and data.csv has two texts and a s",
        ),
        (
            "TripletLoss",
            PAIRS,
            2,
            "TripletLoss needs exactly three texts and no label, and data.csv has 2 texts and no",
        ),
        ("TripletLoss", PAIRS, 4, "has 4 texts and no label. For these columns use MultipleNegativesRankingLoss or Ca"),
        ("MegaBatchMarginLoss", PAIRS, 3, "MegaBatchMarginLoss needs exactly two texts and no label"),
        ("AnglELoss", PAIRS, 2, "or three or more texts and no label, and data.csv has 2 texts"),
        (
            "MultipleNegativesRankingLoss",
            LABELLED_PAIRS,
            2,
            "needs two or more texts and no label, and data.csv has two",
        ),
        ("BatchAllTripletLoss", PAIRS, 2, "needs one text and a label that is a whole number, and data.csv has 2"),
        ("CoSENTLoss", CLASSES, 1, "has one text and a label. For these columns use BatchAllTripletLoss or"),
    ],
)
def test_losses_that_do_not_read_what_is_there(name: str, kind: str, texts: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_loss(name, kind, texts, "data.csv")
    assert message in str(caught.value) and "\n" not in str(caught.value)
