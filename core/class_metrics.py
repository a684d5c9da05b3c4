"""How good a classifier or a regressor is on held-out texts, each figure with the interval that the texts allow.

| Problem | Figures |
| --- | --- |
| one class a text | accuracy, macro F1, macro AUROC (each class against the rest) |
| several labels a text | share of texts with every label right, macro F1, micro F1, macro AUROC |
| numbers | mean squared error, Pearson's and Spearman's correlation |

Macro figures are plain means over the classes that can be measured: a class without a text has neither F1 nor AUROC.
Intervals are 95% percentile bootstrap over texts (Efron & Tibshirani 1993, chapter 13), drawn within each class, so
that every sample has the classes' own sizes; where texts have several labels, or numbers, over all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix  # type: ignore[import-untyped]

from .class_losses import MULTI, REGRESSION, SINGLE
from .errors import ConfigError, DataError
from .evaluate import Metric

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from numpy.typing import NDArray

RESAMPLES = 1000
THRESHOLD = 0.5
# The figure that stands for all of them: what picks the best checkpoint.
PRIMARY = {SINGLE: "macro_f1", MULTI: "macro_f1", REGRESSION: "spearman"}
Statistics = Callable[["NDArray[Any]"], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class or label.

    Args:
        name: What it is called.
        precision, recall, f1: 0 to 1; 0 where nothing was predicted or held.
        support: Texts that have it.
        auroc: Area under its ROC curve against the rest; None where all texts have it, or none.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    auroc: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """Figures with intervals, and what they were made of.

    Args:
        problem: transformers' problem_type.
        names: The classes, in the model's order.
        labels: (N,) integer classes, (N, C) of 0 and 1, or (N, C) numbers.
        scores: (N, C) float64: probabilities, or for a regression the predicted numbers.
        metrics: Each figure; `low` and `high` equal `mean` where no interval was asked for.
        classes: One `ClassScore` a class; empty for a regression.
        confusion: (C, C) texts of class i taken for class j; None unless a text has one class.
    """

    problem: str
    names: tuple[str, ...]
    labels: NDArray[Any]
    scores: NDArray[np.float64]
    metrics: Mapping[str, Metric]
    classes: tuple[ClassScore, ...] = ()
    confusion: NDArray[np.int64] | None = None

    @property
    def texts(self) -> int:
        """How many texts were measured on."""
        return len(self.labels)

    def as_json(self) -> dict[str, Any]:
        """Figures, `intervals`, the classes and the confusion matrix, ready for `json.dumps`."""
        every = ("name", "precision", "recall", "f1", "support", "auroc")
        return {
            "problem_type": self.problem,
            "texts": self.texts,
            **{name: metric.mean for name, metric in self.metrics.items()},
            "intervals": {name: [metric.low, metric.high] for name, metric in self.metrics.items()},
            "classes": [{name: getattr(one, name) for name in every} for one in self.classes],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    def __str__(self) -> str:
        parts = [f"{name} {one.mean:.4f} ({one.low:.4f} to {one.high:.4f})" for name, one in self.metrics.items()]
        return f"{self.texts:,} texts: {', '.join(parts)}"


def measure(
    labels: Any,
    scores: Any,
    names: Sequence[str],
    problem: str = SINGLE,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClassResult:
    """Figures of predictions that were made.

    Args:
        labels: (N,) integer classes; (N, C) of 0 and 1 for several labels; (N,) or (N, C) numbers for a regression.
        scores: (N, C) probabilities, or the predicted numbers, (N,) or (N, C).
        names: The C classes.
        problem: transformers' problem_type.
        resamples: Bootstrap samples for the intervals; 0 for none.
        seed: Of the samples.

    Raises:
        DataError: If there is no text, or shapes or values do not fit each other.
    """
    table = np.asarray(scores, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    wanted = np.asarray(labels)
    wanted = wanted.astype(np.int64) if problem == SINGLE else wanted.reshape(len(wanted), -1).astype(np.float64)
    _check(wanted, table, names, problem)
    statistics = _statistics(wanted, table, problem)
    strata = wanted if problem == SINGLE else np.zeros(len(wanted), dtype=np.int64)
    metrics = _bootstrap(statistics, strata, resamples, seed)
    if problem == REGRESSION:
        return ClassResult(problem=problem, names=tuple(names), labels=wanted, scores=table, metrics=metrics)
    return ClassResult(
        problem=problem,
        names=tuple(names),
        labels=wanted,
        scores=table,
        metrics=metrics,
        classes=_classes(wanted, table, names, problem),
        confusion=_confusion(wanted, table.argmax(axis=1), len(names)) if problem == SINGLE else None,
    )


def paired_change(
    before: ClassResult, after: ClassResult, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Metric]:
    """The figures' differences, each with its interval: both results are drawn on the same texts.

    Raises:
        ConfigError: If the two were not measured on the same labels in the same order.
    """
    if before.problem != after.problem or not np.array_equal(before.labels, after.labels):
        fix = "Measure both on the same data set in the same order"
        raise ConfigError("before and after have other labels", where="paired_change", fix=fix)
    one = _statistics(before.labels, before.scores, before.problem)
    other = _statistics(after.labels, after.scores, after.problem)

    def difference(weights: NDArray[Any]) -> dict[str, float]:
        old, new = one(weights), other(weights)
        return {name: new[name] - old[name] for name in new}

    strata = after.labels if after.problem == SINGLE else np.zeros(after.texts, dtype=np.int64)
    return _bootstrap(difference, strata, resamples, seed)


def auroc(scores: NDArray[np.float64], positive: NDArray[Any], weights: NDArray[Any] | None = None) -> float:
    """Area under the ROC curve: how often a text that has the label scores above one that has not, a tie half.

    Args:
        scores: (N,).
        positive: (N,) of 0 and 1.
        weights: (N,) how often each text counts; None for once.

    Returns:
        0 to 1; nan where all texts have the label, or none.
    """
    return _Roc(scores, positive)(np.ones(len(scores)) if weights is None else weights)


class _Roc:
    """The area for any weights of the texts, sorted once."""

    def __init__(self, scores: NDArray[np.float64], positive: NDArray[Any]) -> None:
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # where another score begins
        self.positive = positive[self.order].astype(np.float64)

    def __call__(self, weights: NDArray[Any]) -> float:
        count = weights[self.order]
        yes = np.add.reduceat(count * self.positive, self.starts)
        no = np.add.reduceat(count * (1 - self.positive), self.starts)
        pairs = yes.sum() * no.sum()
        below = np.cumsum(no) - no
        return float(((below + no / 2) * yes).sum() / pairs) if pairs else float("nan")


def stratified_split(
    dataset: datasets.Dataset, label: str = "label", share: float = 0.1, seed: int = 42
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut a data set in two with the same share of every class in both.

    Args:
        dataset: Its rows.
        label: The column with one class a row: numbers or names.
        share: Of the rows, how many the second part gets, above 0 and below 1.
        seed: Of the draw.

    Returns:
        (the larger rest, the share), rows in their old order.

    Raises:
        ConfigError: If there is no such column, or the share is out of range.
        DataError: If a class has one row only, or a part would have fewer rows than there are classes.
    """
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    if label not in dataset.column_names:
        fix = f"The columns are: {', '.join(dataset.column_names)}"
        raise ConfigError(f"there is no column {label!r}", where="stratified_split", fix=fix)
    if not 0 < share < 1:
        raise ConfigError(f"{share} is not between 0 and 1", where="share", fix="Give a share, such as 0.1")
    values = dataset[label]
    if any(isinstance(value, list | tuple | float) for value in values):
        fix = "Stratify by a column with one class a row"
        raise DataError("it holds no classes", where=f"column {label}", fix=fix)
    classes, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    if (counts < 2).any():
        lonely = classes[counts < 2][0]
        fix = "Add one of its kind, or leave it out"
        raise DataError(f"class {lonely} has one row, which cannot be in both parts", where=f"column {label}", fix=fix)
    second = round(share * len(values))
    if not len(classes) <= second <= len(values) - len(classes):
        fix = "Choose another share, or take more rows"
        raise DataError(f"{second} of {len(values)} rows for {len(classes)} classes", where="share", fix=fix)
    parts = train_test_split(np.arange(len(values)), test_size=second, random_state=seed, stratify=place)
    first, other = (dataset.select(sorted(part.tolist())) for part in parts)
    return first, other


def _check(labels: NDArray[Any], scores: NDArray[np.float64], names: Sequence[str], problem: str) -> None:
    where = "measure"
    if problem not in PRIMARY:
        raise ConfigError(f"{problem!r} is unknown", where="problem_type", fix=f"Use one of {', '.join(PRIMARY)}")
    if not len(labels):
        raise DataError("no text to measure on", where=where, fix="Give at least one")
    if len(labels) != len(scores) or scores.shape[1] != len(names):
        what = f"{len(labels)} labels and {len(names)} names for scores of shape {scores.shape}"
        raise DataError(what, where=where, fix="Give a label for every row and a name for every column")
    if problem != SINGLE and labels.shape != scores.shape:
        what = f"labels of shape {labels.shape} for scores of shape {scores.shape}"
        raise DataError(what, where=where, fix="Give one number for every score")
    if problem == SINGLE and not ((labels >= 0) & (labels < len(names))).all():
        raise DataError(f"a class outside 0 to {len(names) - 1}", where=where, fix="Number the classes as names does")
    if not np.isfinite(scores).all():
        raise DataError("a score is not finite", where=where, fix="Look at the training's loss, and train again")


def _statistics(labels: NDArray[Any], scores: NDArray[np.float64], problem: str) -> Statistics:
    """The figures as a function of how often each text counts, (N,)."""
    if problem == REGRESSION:
        return _regression(labels, scores)
    classes = scores.shape[1]
    table = np.eye(classes)[labels] if problem == SINGLE else labels
    curves = [_Roc(scores[:, place], table[:, place]) for place in range(classes)]
    if problem == SINGLE:
        predicted = scores.argmax(axis=1)
        cell = labels * classes + predicted
        chosen = np.eye(classes)[predicted]
    else:
        chosen = (scores >= THRESHOLD).astype(np.float64)
        exact = (chosen == table).all(axis=1).astype(np.float64)

    def figures(weights: NDArray[Any]) -> dict[str, float]:
        if problem == SINGLE:
            matrix = np.bincount(cell, weights=weights, minlength=classes * classes).reshape(classes, classes)
            hit, held, said = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
            found = {"accuracy": float(hit.sum() / weights.sum())}
        else:
            hit, held, said = weights @ (table * chosen), weights @ table, weights @ chosen
            found = {"exact_match": float(weights @ exact / weights.sum())}
        f1 = 2 * hit / np.maximum(held + said, 1e-300)
        found["macro_f1"] = float(f1[held > 0].mean()) if (held > 0).any() else 0.0
        if problem == MULTI:
            found["micro_f1"] = float(2 * hit.sum() / max((held + said).sum(), 1e-300))
        areas = [area for curve in curves if (area := curve(weights)) == area]
        if areas:
            found["auroc"] = float(np.mean(areas))
        return found

    return figures


def _regression(labels: NDArray[Any], scores: NDArray[np.float64]) -> Statistics:
    def figures(weights: NDArray[Any]) -> dict[str, float]:
        rows = np.repeat(np.arange(len(labels)), weights.astype(np.int64))
        wanted, given = labels[rows], scores[rows]
        ranks = [(rankdata(wanted[:, at]), rankdata(given[:, at])) for at in range(given.shape[1])]
        numbers = [(wanted[:, at], given[:, at]) for at in range(given.shape[1])]
        return {
            "mse": float(((wanted - given) ** 2).mean()),
            "pearson": float(np.mean([_correlation(*pair) for pair in numbers])),
            "spearman": float(np.mean([_correlation(*pair) for pair in ranks])),
        }

    return figures


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's; 0 where either is constant, since it then says nothing of the other."""
    first, second = one - one.mean(), other - other.mean()
    spread = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / spread if spread > 0 else 0.0


def _bootstrap(figures: Statistics, strata: NDArray[Any], resamples: int, seed: int) -> dict[str, Metric]:
    values = figures(np.ones(len(strata)))
    if resamples < 1:
        return {name: Metric(mean=value, low=value, high=value) for name, value in values.items()}
    order = np.argsort(strata, kind="stable")
    parts = [part for part in np.split(order, np.cumsum(np.bincount(strata))[:-1]) if len(part)]
    chance = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(resamples):
        rows = np.concatenate([part[chance.integers(len(part), size=len(part))] for part in parts])
        found = figures(np.bincount(rows, minlength=len(strata)).astype(np.float64))
        for name, kept in drawn.items():
            if name in found:
                kept.append(found[name])
    limits = {name: np.percentile(kept, [2.5, 97.5]) for name, kept in drawn.items()}
    return {
        name: Metric(mean=value, low=float(limits[name][0]), high=float(limits[name][1]))
        for name, value in values.items()
    }


def _confusion(labels: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    matrix: NDArray[np.int64] = confusion_matrix(labels, predicted, labels=np.arange(classes)).astype(np.int64)
    return matrix


def _classes(
    labels: NDArray[Any], scores: NDArray[np.float64], names: Sequence[str], problem: str
) -> tuple[ClassScore, ...]:
    if problem == SINGLE:
        table = np.eye(len(names), dtype=np.int64)[labels]
        chosen = np.eye(len(names), dtype=np.int64)[scores.argmax(axis=1)]
    else:
        table, chosen = labels.astype(np.int64), (scores >= THRESHOLD).astype(np.int64)
    counts = multilabel_confusion_matrix(table, chosen, labels=np.arange(len(names)))
    found = []
    for place, name in enumerate(names):
        (_, false), (missed, hit) = counts[place]
        area = auroc(scores[:, place], table[:, place])
        found.append(
            ClassScore(
                name=name,
                precision=float(hit / max(hit + false, 1)),
                recall=float(hit / max(hit + missed, 1)),
                f1=float(2 * hit / max(2 * hit + false + missed, 1)),
                support=int(hit + missed),
                auroc=None if area != area else area,
            )
        )
    return tuple(found)
