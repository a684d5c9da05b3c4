"""Temperature scaling: probabilities that are as often right as they say (Guo, Pleiss, Sun & Weinberger 2017).

The logits are divided by one number T > 0 that is fitted on held-out texts. The order of the classes stays, and with it
every prediction of one class out of many, and of yes or no at a threshold of 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from scipy.special import expit, log_expit, log_softmax, softmax  # type: ignore[import-untyped]

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

BINS = 15  # as in the paper
# Beyond these a temperature is no calibration: the head is constant, or right everywhere on the held-out texts.
COLDEST, HOTTEST = 0.02, 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The predictions whose confidence lies in one stretch.

    Args:
        low, high: The stretch, low < confidence <= high (the first one includes 0).
        count: Predictions in it.
        confidence, accuracy: Their means; 0.0 where there are none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What fitting found.

    Args:
        temperature: What logits are divided by.
        texts: How many it was fitted on.
        nll_before, nll_after: Mean negative log-likelihood of the labels, in nats.
        ece_before, ece_after: Expected calibration error, 0 to 1. "After" is on the texts of the fit.
    """

    temperature: float
    texts: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:.3f} from {self.texts:,} texts: expected calibration error "
            f"{self.ece_before:.4f} before, {self.ece_after:.4f} after"
        )


def probabilities(logits: ArrayLike, temperature: float = 1.0, *, multi_label: bool = False) -> NDArray[np.float64]:
    """(N, C) float64 probabilities: softmax over the classes, or with `multi_label` a sigmoid for each label."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    result: NDArray[np.float64] = expit(scaled) if multi_label else softmax(scaled, axis=1)
    return result


def negative_log_likelihood(
    logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0, *, multi_label: bool = False
) -> float:
    """Mean over texts, and over labels with `multi_label`, in nats."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    wanted = np.asarray(labels)
    if multi_label:
        return float(-np.where(wanted > 0.5, log_expit(scaled), log_expit(-scaled)).mean())
    return float(-log_softmax(scaled, axis=1)[np.arange(len(scaled)), wanted.astype(np.int64)].mean())


def fit_temperature(logits: ArrayLike, labels: ArrayLike, *, multi_label: bool = False) -> Calibration:
    """The temperature under which held-out labels are likeliest.

    Args:
        logits: (N, C), of texts that were not trained on.
        labels: (N,) integer classes, or with `multi_label` (N, C) of 0 and 1.
        multi_label: Whether labels do not exclude each other.

    Returns:
        The temperature, and what it does on these texts.

    Raises:
        DataError: If there is nothing to fit on, or no temperature fits because every label, or none, is told from
            the others: then the best one is 0 or infinite.
    """
    table, wanted = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or not len(table) or not np.isfinite(table).all():
        raise DataError(f"logits of shape {table.shape}", where="calibrate", fix="Give finite logits of some texts")

    def loss(inverse: float) -> float:  # convex in 1 / T, so that a bounded search finds the one minimum
        return negative_log_likelihood(table, wanted, 1 / inverse, multi_label=multi_label)

    found = minimize_scalar(loss, bounds=(1 / HOTTEST, 1 / COLDEST), method="bounded", options={"xatol": 1e-7})
    temperature = 1 / float(found.x)
    if temperature > HOTTEST * 0.999 or temperature < COLDEST * 1.001:
        side = "at random" if temperature > 1 else "right on every one"
        fix = "Calibrate a trained model on more held-out texts"
        raise DataError(
            f"no temperature fits: on these {len(table)} texts the model is {side}", where="calibrate", fix=fix
        )
    before, after = (
        probabilities(table, multi_label=multi_label),
        probabilities(table, temperature, multi_label=multi_label),
    )
    return Calibration(
        temperature=temperature,
        texts=len(table),
        nll_before=loss(1.0),
        nll_after=loss(1 / temperature),
        ece_before=expected_calibration_error(before, wanted, multi_label=multi_label),
        ece_after=expected_calibration_error(after, wanted, multi_label=multi_label),
    )


def reliability(probability: ArrayLike, labels: ArrayLike, *, multi_label: bool = False, bins: int = BINS) -> list[Bin]:
    """Confidence beside accuracy, in stretches of equal width.

    Args:
        probability: (N, C).
        labels: (N,) integer classes, or with `multi_label` (N, C) of 0 and 1.
        multi_label: Each label of each text is then a prediction: its probability beside how often it holds. Otherwise
            each text is one: the highest probability beside how often that class is right.
        bins: How many stretches of 0 to 1.
    """
    table, wanted = np.asarray(probability, dtype=np.float64), np.asarray(labels)
    if multi_label:
        confidence, right = table.ravel(), wanted.ravel().astype(np.float64)
    else:
        confidence, right = table.max(axis=1), (table.argmax(axis=1) == wanted).astype(np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=one, minlength=bins) for one in (confidence, right)]
    sure, correct = (total / np.maximum(count, 1) for total in sums)
    return [
        Bin(
            low=at / bins,
            high=(at + 1) / bins,
            count=int(count[at]),
            confidence=float(sure[at]),
            accuracy=float(correct[at]),
        )
        for at in range(bins)
    ]


def expected_calibration_error(
    probability: ArrayLike, labels: ArrayLike, *, multi_label: bool = False, bins: int = BINS
) -> float:
    """Mean distance of confidence and accuracy over the predictions' bins, 0 to 1 (Naeini et al. 2015)."""
    stretches = reliability(probability, labels, multi_label=multi_label, bins=bins)
    total = sum(one.count for one in stretches)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in stretches) / total if total else 0.0


def check_temperature(value: float, where: str = "temperature") -> float:
    """`value`, if logits can be divided by it.

    Raises:
        ConfigError: If it is not a positive number.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{value!r} is not a positive number", where=where, fix="Give one, such as 1.0")
    return float(value)
