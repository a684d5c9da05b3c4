"""Figures of classifiers against scikit-learn and scipy, and intervals against what they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset  # type: ignore[import-untyped]
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    accuracy_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from burnish.core.class_losses import MULTI, REGRESSION
from burnish.core.class_metrics import auroc, measure, paired_change, stratified_split
from burnish.core.errors import ConfigError, DataError

NAMES = ("bird", "cat", "dog")


def predictions(texts: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    labels = chance.choice(3, size=texts, p=[0.6, 0.3, 0.1])
    logits = chance.normal(size=(texts, 3)) + 1.5 * np.eye(3)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_one_class_a_text() -> None:
    labels, table = predictions()
    found = measure(labels, table, NAMES, resamples=50)
    chosen = table.argmax(axis=1)
    assert found.metrics["accuracy"].mean == pytest.approx(accuracy_score(labels, chosen))
    assert found.metrics["macro_f1"].mean == pytest.approx(f1_score(labels, chosen, average="macro"))
    wanted = roc_auc_score(labels, table, multi_class="ovr", average="macro")
    assert found.metrics["auroc"].mean == pytest.approx(wanted)
    precision, recall, f1, support = precision_recall_fscore_support(labels, chosen)
    for place, one in enumerate(found.classes):
        expected = (NAMES[place], precision[place], recall[place], f1[place], support[place])
        assert (one.name, one.precision, one.recall, one.f1, one.support) == pytest.approx(expected)
        assert one.auroc == pytest.approx(roc_auc_score(labels == place, table[:, place]))
    assert found.confusion is not None
    assert found.confusion.sum() == 400 and found.confusion[2].sum() == (labels == 2).sum()
    assert json.loads(json.dumps(found.as_json()))["classes"][0]["name"] == "bird"
    assert "400 texts: accuracy 0." in str(found)


def test_several_labels_a_text() -> None:
    chance = np.random.default_rng(4)
    labels = (chance.random((200, 3)) < [0.5, 0.2, 0.4]).astype(int)
    table = np.clip(0.4 * labels + chance.random((200, 3)) * 0.7, 0, 1)
    found = measure(labels, table, NAMES, MULTI, resamples=20)
    chosen = (table >= 0.5).astype(int)
    assert found.metrics["exact_match"].mean == pytest.approx(accuracy_score(labels, chosen))
    assert found.metrics["macro_f1"].mean == pytest.approx(f1_score(labels, chosen, average="macro"))
    assert found.metrics["micro_f1"].mean == pytest.approx(f1_score(labels, chosen, average="micro"))
    assert found.metrics["auroc"].mean == pytest.approx(roc_auc_score(labels, table, average="macro"))
    assert found.confusion is None


def test_numbers() -> None:
    chance = np.random.default_rng(5)
    wanted = chance.integers(0, 6, size=100).astype(float)  # with ties
    given = wanted + chance.normal(size=100)
    found = measure(wanted, given, ["score"], REGRESSION, resamples=20)
    assert found.metrics["mse"].mean == pytest.approx(((wanted - given) ** 2).mean())
    assert found.metrics["pearson"].mean == pytest.approx(pearsonr(wanted, given).statistic)
    assert found.metrics["spearman"].mean == pytest.approx(spearmanr(wanted, given).statistic)
    constant = measure(wanted, np.ones(100), ["score"], REGRESSION, resamples=0)
    assert constant.metrics["pearson"].mean == constant.metrics["spearman"].mean == 0


def test_area_under_the_curve_with_ties_and_weights() -> None:
    chance = np.random.default_rng(6)
    scores, positive = chance.integers(0, 5, size=80) / 4, chance.integers(0, 2, size=80)
    weights = chance.integers(0, 4, size=80).astype(float)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    wanted = roc_auc_score(positive, scores, sample_weight=weights)
    assert auroc(scores, positive, weights) == pytest.approx(wanted)
    assert auroc(scores, positive, weights) == pytest.approx(
        auroc(np.repeat(scores, weights.astype(int)), np.repeat(positive, weights.astype(int)))
    )
    assert np.isnan(auroc(scores, np.ones(80)))


def test_a_class_without_a_text_is_left_out_of_the_means() -> None:
    labels, table = predictions()
    kept = labels != 2
    found = measure(labels[kept], table[kept], NAMES, resamples=10)
    assert found.classes[2].support == 0 and found.classes[2].auroc is None
    chosen = table[kept].argmax(axis=1)
    wanted = f1_score(labels[kept], chosen, labels=[0, 1], average="macro")
    assert found.metrics["macro_f1"].mean == pytest.approx(wanted)


def test_intervals_are_as_wide_as_the_theory_of_shares_says() -> None:
    labels, table = predictions(2000)
    found = measure(labels, table, NAMES).metrics["accuracy"]
    # Within each class a share of n_c texts: variances add with the classes' weights.
    right = table.argmax(axis=1) == labels
    variance = sum(
        (labels == place).mean() ** 2 * right[labels == place].var() / (labels == place).sum() for place in range(3)
    )
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.1)
    assert found.low < found.mean < found.high
    few = measure(labels[:200], table[:200], NAMES).metrics["accuracy"]
    assert few.high - few.low > 2 * (found.high - found.low)


def test_intervals_follow_the_seed_and_can_be_left_out() -> None:
    labels, table = predictions()
    one, same, other = (measure(labels, table, NAMES, resamples=30, seed=seed).metrics for seed in (1, 1, 2))
    assert one == same and one != other
    bare = measure(labels, table, NAMES, resamples=0).metrics["accuracy"]
    assert bare.low == bare.mean == bare.high


def test_a_paired_change_is_narrower_than_two_results_apart() -> None:
    labels, table = predictions(1000)
    better = table + 0.05 * np.eye(3)[labels]
    before, after = measure(labels, table, NAMES), measure(labels, better, NAMES)
    change = paired_change(before, after)["accuracy"]
    assert change.mean == pytest.approx(after.metrics["accuracy"].mean - before.metrics["accuracy"].mean)
    assert 0 < change.low < change.mean
    assert change.high - change.low < (after.metrics["accuracy"].high - after.metrics["accuracy"].low)
    with pytest.raises(ConfigError, match="same data set in the same order"):
        paired_change(before, measure(labels[::-1], table[::-1], NAMES, resamples=0))


@pytest.mark.parametrize(
    ("labels", "table", "said"),
    [
        ([], np.zeros((0, 3)), "no text"),
        ([0, 1], np.full((1, 3), 0.3), "2 labels"),
        ([0], np.full((1, 2), 0.5), "3 names"),
        ([3], np.full((1, 3), 0.3), "outside 0 to 2"),
        ([0], np.full((1, 3), np.nan), "not finite"),
    ],
)
def test_what_does_not_fit_is_an_error(labels: list[int], table: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        measure(labels, table, NAMES)


def rows(counts: dict[str, int]) -> Dataset:
    labels = [name for name, count in counts.items() for _ in range(count)]
    return Dataset.from_dict({"text": [f"{name} {at}" for at, name in enumerate(labels)], "label": labels})


@pytest.mark.parametrize("numbered", [False, True])
def test_a_stratified_split_keeps_the_shares(numbered: bool) -> None:
    data = rows({"a": 60, "b": 30, "c": 10})
    if numbered:
        data = data.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    first, second = stratified_split(data, share=0.2, seed=3)
    names = ("a", "b", "c")
    wanted = [0, 1, 2] if numbered else list(names)
    assert [list(second["label"]).count(one) for one in wanted] == [12, 6, 2]
    assert sorted([*first["text"], *second["text"]]) == sorted(data["text"])
    again, other = (stratified_split(data, share=0.2, seed=seed)[1]["text"] for seed in (3, 4))
    assert list(again) == list(second["text"]) and list(other) != list(second["text"])


def test_what_cannot_be_split_is_an_error() -> None:
    with pytest.raises(DataError, match="class c has one row"):
        stratified_split(rows({"a": 6, "b": 3, "c": 1}), share=0.3)
    with pytest.raises(DataError, match="1 of 12 rows for 3 classes"):
        stratified_split(rows({"a": 4, "b": 4, "c": 4}), share=0.1)
    with pytest.raises(ConfigError, match="no column 'class'"):
        stratified_split(rows({"a": 4}), label="class")
    with pytest.raises(ConfigError, match=r"1\.5 is not between"):
        stratified_split(rows({"a": 4}), share=1.5)
    with pytest.raises(DataError, match="holds no classes"):
        stratified_split(Dataset.from_dict({"label": [[1, 0], [0, 1]]}), share=0.5)
