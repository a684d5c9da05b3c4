"""A classifier on one page: how good, which classes it takes for which, and whether its probabilities can be believed.

One self-contained HTML file, in the manner of `core.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration import Calibration, expected_calibration_error, reliability
from .class_losses import MULTI, REGRESSION, SINGLE
from .class_metrics import ClassResult
from .evaluate import Metric
from .report import AFTER, BEFORE, INK, MUTED, RULE, loss_chart, page_template, shorten, svg, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

TITLES = {
    "accuracy": "Accuracy",
    "exact_match": "Every label right",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "auroc": "AUROC",
    "mse": "Mean squared error",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
LESS_IS_MORE = ("mse",)
# A larger matrix has cells that nobody can read; the list of confusions below it goes on.
LARGEST_MATRIX = 40
CONFUSIONS, EXAMPLES = 12, 2
# The accent at this strength lets the ink on it be read in both colour schemes.
STRONGEST = 0.55


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """What the page tells, as plain values. What is empty or None gets no section.

    Args:
        title, model, family, data: Headings.
        summary: The outcome in one sentence.
        result: The figures on held-out texts.
        before: The same before training, or of another model, on the same texts.
        change: Their difference, as `paired_change` returns it.
        raw: (N, C) probabilities before calibration, if there was one.
        calibration: What fitting the temperature found, on other texts than these.
        texts: The held-out texts, for examples of confusions; a pair is a sequence of two.
        history: Logged points with `step` and `loss`: `trainer.state.log_history`.
        environment: Versions and hardware, as they should read.
        settings: Hyper-parameters.
        how_to_use: A snippet of code.
        notes: Sentences a reader must not miss.
    """

    title: str
    model: str
    summary: str
    result: ClassResult
    family: str = ""
    data: str = ""
    before: ClassResult | None = None
    change: Mapping[str, Metric] | None = None
    raw: NDArray[np.float64] | None = None
    calibration: Calibration | None = None
    texts: Sequence[Any] = ()
    history: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    how_to_use: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Texts of one class that were taken for another.

    Args:
        actual, predicted: The classes' names.
        count: How many texts.
        share: Of the actual class's texts, 0 to 1.
        examples: Those that the model was surest of, shortened.
    """

    actual: str
    predicted: str
    count: int
    share: float
    examples: tuple[str, ...]


def write_class_report(path: Path, report: ClassReport) -> None:
    """Write `report` to `path` as one self-contained HTML file, whole or not at all.

    Raises:
        ConfigError: matplotlib or jinja2, the extra `report`, is not installed.
    """
    template = page_template("class_report_template.html.j2")
    from markupsafe import Markup

    result = report.result
    several = result.problem == MULTI
    history = [(int(row["step"]), float(row["loss"])) for row in report.history if "loss" in row]
    regression = result.problem == REGRESSION
    matrix = result.confusion is not None and len(result.names) <= LARGEST_MATRIX
    error = None if regression else expected_calibration_error(result.scores, result.labels, multi_label=several)
    raw = report.raw
    html = template.render(
        report=report,
        result=result,
        headline=headline(report),
        matrix=Markup(confusion_chart(result)) if matrix else None,
        matrix_width=round(96 * confusion_size(result)[0]) if matrix else 0,
        largest=LARGEST_MATRIX,
        reliable=None if regression else Markup(reliability_chart(result, raw)),
        error=error,
        raw_error=None if raw is None else expected_calibration_error(raw, result.labels, multi_label=several),
        scatter=Markup(scatter_chart(result)) if regression else None,
        loss=Markup(loss_chart(history)) if len(history) > 1 else None,
        history=history,
        confusions=confusions(result, report.texts),
        earlier={one.name: one for one in report.before.classes} if report.before else {},
    )
    write_page(path, html)


def headline(report: ClassReport) -> list[dict[str, Any]]:
    """Each figure: `now`, `before` and `gain` where measured, with a `verdict` (up, down, unclear)."""
    rows = []
    for name, metric in report.result.metrics.items():
        gain = report.change.get(name) if report.change else None
        verdict = None
        if gain is not None:
            better = gain.high < 0 if name in LESS_IS_MORE else gain.low > 0
            worse = gain.low > 0 if name in LESS_IS_MORE else gain.high < 0
            verdict = "up" if better else "down" if worse else "unclear"
        before = report.before.metrics.get(name) if report.before else None
        rows.append({"title": TITLES[name], "now": metric, "before": before, "gain": gain, "verdict": verdict})
    return rows


def confusions(result: ClassResult, texts: Sequence[Any]) -> list[Confusion]:
    """The most frequent ones, each with the texts that the model was surest to have right."""
    if result.confusion is None:
        return []
    wrong = result.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    predicted = result.scores.argmax(axis=1)
    found = []
    for actual, taken in zip(*np.unravel_index(order, wrong.shape), strict=True):
        count = int(wrong[actual, taken])
        if not count:
            break
        rows = np.flatnonzero((result.labels == actual) & (predicted == taken))
        surest: Any = rows[np.argsort(-result.scores[rows, taken], kind="stable")][:EXAMPLES] if len(texts) else []
        found.append(
            Confusion(
                actual=result.names[actual],
                predicted=result.names[taken],
                count=count,
                share=count / int(result.confusion[actual].sum()),
                examples=tuple(shorten(_text(texts[row]), 150) for row in surest),
            )
        )
    return found


def _text(text: Any) -> str:
    return text if isinstance(text, str) else " / ".join(text)


def confusion_size(result: ClassResult) -> tuple[float, float]:
    """Width and height in inches, so that its type is as large as the page's."""
    cell = min(0.75, max(0.25, 6.2 / len(result.names)))
    names = 0.075 * max(len(name) for name in _short_names(result)) + 0.5
    side = cell * len(result.names)
    return side + names, side * 0.8 + names


def confusion_chart(result: ClassResult) -> str:
    """Actual classes down, predicted ones across; a cell's strength is its share of the actual class."""
    assert result.confusion is not None
    matrix, names = result.confusion, _short_names(result)
    count = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = 9.0 if count <= 20 else 6.5

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        for row in range(count):
            for column in range(count):
                corner, number = (column - 0.5, row - 0.5), matrix[row, column]
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=RULE, linewidth=0.6))
                if number:
                    color, strength = (AFTER if row == column else BEFORE), STRONGEST * float(shares[row, column])
                    strength = max(0.06, strength if row == column else min(1.0, 1.6 * strength))
                    axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, alpha=strength, linewidth=0))
                    axes.text(column, row, f"{number:,}", ha="center", va="center", color=INK, fontsize=size)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted", color=MUTED)
        axes.set_ylabel("actual", color=MUTED)

    words = f"Confusion matrix of {count} classes: {int(matrix.trace())} of {int(matrix.sum())} texts on the diagonal"
    style = {"axes.grid": False, "axes.spines.bottom": False, "ytick.labelcolor": INK}
    return svg("confusion", words, draw, confusion_size(result), style)


def _short_names(result: ClassResult) -> list[str]:
    return [shorten(name, 28) for name in result.names]


def reliability_chart(result: ClassResult, raw: NDArray[np.float64] | None = None) -> str:
    """How often predictions of one confidence are right; on the diagonal they are as often as they say."""
    several = result.problem == MULTI
    now = reliability(result.scores, result.labels, multi_label=several)
    earlier = [] if raw is None else reliability(raw, result.labels, multi_label=several)
    largest = max(one.count for one in now)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        for one in now:
            if one.count:
                width, middle = one.high - one.low, (one.low + one.high) / 2
                axes.bar(
                    middle, one.accuracy, 0.9 * width, color=AFTER, alpha=min(1.0, 0.2 + 0.8 * one.count / largest)
                )
        if earlier:
            kept = [one for one in earlier if one.count]
            line = [(one.low + one.high) / 2 for one in kept], [one.accuracy for one in kept]
            axes.plot(*line, color=BEFORE, linewidth=1.6, marker="o", markersize=3)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability" if several else "confidence", color=MUTED)
        axes.set_ylabel("share that holds" if several else "share that is right", color=MUTED)

    words = "Reliability: " + "; ".join(
        f"confidence {one.confidence:.2f} right {one.accuracy:.2f} ({one.count})" for one in now if one.count
    )
    return svg("reliability", words, draw)


def scatter_chart(result: ClassResult) -> str:
    """Predicted beside actual numbers, at most 2,000 of them."""
    wanted, given = result.labels.ravel(), result.scores.ravel()
    chosen = np.random.default_rng(0).permutation(len(wanted))[:2000]

    def draw(axes: Axes) -> None:
        low, high = min(wanted.min(), given.min()), max(wanted.max(), given.max())
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.scatter(wanted[chosen], given[chosen], s=6, color=AFTER, alpha=0.5, linewidths=0)
        axes.set_xlabel("actual", color=MUTED)
        axes.set_ylabel("predicted", color=MUTED)

    pearson = result.metrics["pearson"].mean
    return svg("scatter", f"Predicted beside actual numbers, correlation {pearson:.3f}", draw)


def summary_of(result: ClassResult, before: ClassResult | None = None) -> str:
    """The outcome in one sentence."""
    first = next(iter(result.metrics))
    words = TITLES[first]
    now = result.metrics[first]
    text = f"{words} {now.mean:.3f} ({now.low:.3f} to {now.high:.3f}) on {result.texts:,} held-out texts"
    if result.problem == SINGLE:
        text += f" of {len(result.names)} classes"
    return text + (f", {before.metrics[first].mean:.3f} before." if before is not None else ".")
