"""Temperature scaling against torch, and expected calibration error against its definition, bin by bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.core.calibration import (
    BINS,
    check_temperature,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    reliability,
)
from burnish.core.errors import ConfigError, DataError


def drawn(texts: int, classes: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels that follow the probabilities of logits, and those logits made over-confident by `temperature`."""
    chance = np.random.default_rng(1)
    logits = 2 * chance.normal(size=(texts, classes))
    share = probabilities(logits)
    labels = np.array([chance.choice(classes, p=row) for row in share])
    return logits * temperature, labels


def test_the_temperature_that_made_probabilities_wrong_is_found() -> None:
    logits, labels = drawn(20_000, 5, 3.0)
    found = fit_temperature(logits, labels)
    assert found.temperature == pytest.approx(3.0, rel=0.03)
    assert found.ece_before > 0.1 and found.ece_after < 0.02  # 0.01 is the noise of 20,000 texts in 15 bins
    assert found.nll_after < found.nll_before
    assert "temperature 3." in str(found)


def test_it_is_the_minimum_that_torch_finds() -> None:
    logits, labels = drawn(500, 4, 2.0)
    found = fit_temperature(logits, labels)
    inverse = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.tensor(logits) * inverse, torch.tensor(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert found.temperature == pytest.approx(1 / inverse.item(), rel=1e-5)
    assert found.nll_after == pytest.approx(closure().item(), abs=1e-12)


def test_no_prediction_changes() -> None:
    logits, labels = drawn(1000, 6, 2.5)
    temperature = fit_temperature(logits, labels).temperature
    before, after = probabilities(logits), probabilities(logits, temperature)
    assert not np.allclose(before, after)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    several = probabilities(logits, temperature, multi_label=True)
    assert ((several >= 0.5) == (probabilities(logits, multi_label=True) >= 0.5)).all()


def test_several_labels_a_text() -> None:
    chance = np.random.default_rng(2)
    logits = chance.normal(size=(8000, 3))
    labels = (chance.random(logits.shape) < probabilities(logits, multi_label=True)).astype(float)
    found = fit_temperature(logits * 2, labels, multi_label=True)
    assert found.temperature == pytest.approx(2.0, rel=0.05)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits * 2), torch.tensor(labels))
    assert found.nll_before == pytest.approx(wanted.item(), abs=1e-12)


def test_the_error_is_what_its_definition_says() -> None:
    chance = np.random.default_rng(3)
    table, labels = chance.dirichlet(np.ones(4), size=300), chance.integers(4, size=300)
    table[0], labels[0] = [1, 0, 0, 0], 0  # a confidence of 1 belongs to the last bin
    wanted = 0.0
    for at in range(BINS):
        inside = [row for row in range(300) if at / BINS < table[row].max() <= (at + 1) / BINS]  # no confidence is 0
        if inside:
            right = np.mean([table[row].argmax() == labels[row] for row in inside])
            wanted += len(inside) / 300 * abs(right - np.mean([table[row].max() for row in inside]))
    assert wanted > 0.05
    assert expected_calibration_error(table, labels) == pytest.approx(wanted, abs=1e-12)
    assert sum(one.count for one in reliability(table, labels)) == 300


def test_what_is_certain_and_right_has_no_error() -> None:
    table = np.eye(3)[[0, 1, 2, 2]]
    assert expected_calibration_error(table, np.array([0, 1, 2, 2])) == 0
    assert expected_calibration_error(table, np.array([1, 1, 2, 2])) == 0.25
    # With several labels, a probability of 0 belongs to the first bin.
    assert expected_calibration_error(table, table, multi_label=True) == 0


def test_what_has_no_temperature_is_an_error() -> None:
    sure = np.array([[5.0, 0.0], [0.0, 5.0]])
    with pytest.raises(DataError, match="right on every one"):
        fit_temperature(sure, np.array([0, 1]))
    with pytest.raises(DataError, match="at random"):
        fit_temperature(sure, np.array([1, 0]))
    with pytest.raises(DataError, match="finite logits"):
        fit_temperature(sure * np.nan, np.array([0, 1]))
    with pytest.raises(DataError, match="finite logits"):
        fit_temperature(np.zeros((0, 2)), np.array([]))


def test_likelihood_is_torchs() -> None:
    logits, labels = drawn(50, 3, 1.0)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits) / 1.7, torch.tensor(labels))
    assert negative_log_likelihood(logits, labels, 1.7) == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2"])
def test_a_temperature_is_a_positive_number(value: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature: .* is not a positive number"):
        check_temperature(value)
    assert check_temperature(2) == 2.0
