"""Losses of classifiers, with the interface of Sentence Transformers' cross-encoder losses.

| Loss | Labels | Formula, over the N texts of a batch |
| --- | --- | --- |
| `CrossEntropyLoss` | (N,) integer | weighted mean of -log p(label) |
| `FocalLoss` | (N,) integer, or (N, C) 0 and 1 | the same with a factor (1 - p)^gamma (Lin et al. 2017) |
| `MultiLabelLoss` | (N, C) 0 and 1 | mean of the binary cross-entropies |
| `RegressionLoss` | (N,) or (N, C) | mean squared error |

Without weights, smoothing or focus they are the loss that transformers' own `ForSequenceClassification` models compute
for the same `problem_type`. No loss asks the device for a number, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from sentence_transformers import CrossEncoder

Weights = Literal["balanced"] | Sequence[float] | None
SINGLE: Final = "single_label_classification"
MULTI: Final = "multi_label_classification"
REGRESSION: Final = "regression"


def balanced_weights(labels: ArrayLike, classes: int) -> NDArray[np.float64]:
    """N / (C * n_c) for each of C classes with n_c of the N texts: each counts the same in sum (King & Zeng 2001).

    Args:
        labels: (N,) integer, the class of each text.
        classes: C.

    Returns:
        (C,) float64.

    Raises:
        DataError: If a class has no text, so that no weight could make it count.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)
    if (empty := np.flatnonzero(counts == 0)).size:
        fix = "Leave the class out of labels, add texts, or give the weights as numbers"
        raise DataError(f"class {empty[0]} has no text", where="class_weights='balanced'", fix=fix)
    weights: NDArray[np.float64] = counts.sum() / (classes * counts)
    return weights


def balanced_pos_weights(labels: ArrayLike) -> NDArray[np.float64]:
    """Texts without the label over texts with it, for each of C labels.

    Args:
        labels: (N, C) of 0 and 1.

    Returns:
        (C,) float64.

    Raises:
        DataError: If no text has a label, so that no weight could make it count.
    """
    table = np.asarray(labels, dtype=np.float64)
    positive = table.sum(axis=0)
    if (empty := np.flatnonzero(positive == 0)).size:
        fix = "Leave the label out of labels, add texts, or give the weights as numbers"
        raise DataError(f"no text has label {empty[0]}", where="pos_weight='balanced'", fix=fix)
    weights: NDArray[np.float64] = (len(table) - positive) / positive
    return weights


class ClassLoss(nn.Module):
    """What all of them share: texts or pairs to logits, and weights that wait for the training data.

    Args:
        model: The classifier.
        weights: One number a class, "balanced", or None.
        where: What an error calls `weights`.

    Raises:
        ConfigError: If the weights are not one positive number a class.
    """

    problems: tuple[str, ...] = ()
    weights: Tensor | None

    def __init__(self, model: CrossEncoder, weights: Weights = None, where: str = "class_weights") -> None:
        super().__init__()
        self.model = model
        self.problem = problem_of(model)
        if self.problems and self.problem not in self.problems:
            what = f"the model's problem_type is {self.problem}"
            raise ConfigError(what, where=type(self).__name__, fix=f"Use {' or '.join(_LOSS_OF[self.problem])}")
        self.asked = weights if isinstance(weights, str) or weights is None else [float(one) for one in weights]
        self._where = where
        # Not part of what is saved: the run's settings, not the model's.
        self.register_buffer("weights", None, persistent=False)
        if isinstance(weights, str) and weights != "balanced":
            raise ConfigError(f"{weights!r} is unknown", where=where, fix="Pass 'balanced', a number a class, or None")
        if self.asked is not None and not isinstance(self.asked, str):
            self._take(np.asarray(self.asked, dtype=np.float64))

    @property
    def waits(self) -> bool:
        """Whether the weights are "balanced" and the data has not been counted yet."""
        return self.asked == "balanced" and self.weights is None

    def count(self, labels: ArrayLike) -> None:
        """Work "balanced" out from the labels of the training data; `ClassifierTrainer` calls it."""
        if self.asked != "balanced":
            return
        table = np.asarray(labels)
        single = self.problem == SINGLE
        self._take(balanced_weights(table, self.model.num_labels) if single else balanced_pos_weights(table))

    def _take(self, weights: NDArray[np.float64]) -> None:
        classes = self.model.num_labels
        if weights.shape != (classes,):
            what = f"{weights.size} weights for {classes} classes"
            raise ConfigError(what, where=self._where, fix="Give one for each, in the order of the model's labels")
        if not np.all(np.isfinite(weights)) or np.any(weights <= 0):
            bad = weights[~(np.isfinite(weights) & (weights > 0))][0]
            raise ConfigError(f"{bad:g} is not a positive number", where=self._where, fix="Give positive weights")
        self.weights = torch.tensor(weights, device=self.model.device, dtype=torch.float32)

    def logits(self, inputs: Sequence[Sequence[str]], prompt: str | None, task: str | None) -> Tensor:
        """(N, C) logits of one column of texts, or of two columns whose rows make pairs.

        Raises:
            DataError: For another number of columns.
        """
        if not 1 <= len(inputs) <= 2:
            fix = "Keep one text column, or two whose texts make a pair: dataset.select_columns([…])"
            raise DataError(f"{len(inputs)} text columns", where=type(self).__name__, fix=fix)
        texts: Any = list(inputs[0]) if len(inputs) == 1 else list(zip(inputs[0], inputs[1], strict=True))
        features = batch_to_device(self.model.preprocess(texts, prompt=prompt, task=task), self.model.device)
        scores: Tensor = self.model(features)["scores"]
        return scores

    def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            inputs: One or two columns of N texts.
            labels: As the module's table says; a list of N rows is stacked.
            prompt: Put before every text.
            task: Handed on to `model.preprocess`.

        Raises:
            ConfigError: If the weights are "balanced" and no trainer has counted the training data.
        """
        if self.waits:
            fix = "Train with ClassifierTrainer, which counts the training data, or give the weights as numbers"
            raise ConfigError("no data was counted", where=f"{self._where}='balanced'", fix=fix)
        logits = self.logits(inputs, prompt, task)
        table = torch.stack([torch.as_tensor(row) for row in labels]) if isinstance(labels, list) else labels
        return self.value(logits, table.to(logits.device))

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (N, C) logits, a scalar."""
        raise NotImplementedError

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {self._where: self.asked}


class CrossEntropyLoss(ClassLoss):
    """Cross-entropy over classes that exclude each other: `torch.nn.functional.cross_entropy`.

    Args:
        model: A classifier with problem_type "single_label_classification".
        class_weights: One positive number a class; "balanced" for N / (C * n_c) of the training data; None for equal.
            As in torch, the sum is divided by the sum of the batch's weights.
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2016), 0 to below 1.

    Raises:
        ConfigError: If a setting is out of range, or the model is of another kind.
    """

    problems = (SINGLE,)

    def __init__(self, model: CrossEncoder, class_weights: Weights = None, label_smoothing: float = 0.0) -> None:
        super().__init__(model, class_weights)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"{label_smoothing} is out of range", where="label_smoothing", fix="Give 0 to below 1")
        self.label_smoothing = label_smoothing

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (N, C) logits and (N,) integer labels, a scalar."""
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        return functional.cross_entropy(logits, labels.view(-1), weights, label_smoothing=self.label_smoothing)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {**super().get_config_dict(), "label_smoothing": self.label_smoothing}


class FocalLoss(ClassLoss):
    """Cross-entropy in which texts that are right already count less: a factor (1 - p)^gamma (Lin et al. 2017).

    With gamma = 0 it is `CrossEntropyLoss`, or `MultiLabelLoss` for a model with problem_type
    "multi_label_classification", whose labels are then C questions of yes and no each.

    Args:
        model: A classifier.
        gamma: The focus, at least 0; 2 in the paper.
        class_weights: The paper's alpha: as in `CrossEntropyLoss`; for multi-label as `pos_weight` in `MultiLabelLoss`.

    Raises:
        ConfigError: If a setting is out of range, or the model is of another kind.
    """

    problems = (SINGLE, MULTI)

    def __init__(self, model: CrossEncoder, gamma: float = 2.0, class_weights: Weights = None) -> None:
        super().__init__(model, class_weights)
        if not 0 <= gamma < float("inf"):
            raise ConfigError(f"{gamma} is out of range", where="gamma", fix="Give a number of at least 0")
        self.gamma = gamma

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (N, C) logits and the labels of the model's kind, a scalar."""
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        if self.problem == MULTI:
            wanted = labels.to(logits.dtype)
            log_p, log_not = functional.logsigmoid(logits), functional.logsigmoid(-logits)
            yes, no = self._focus(log_not) * log_p, self._focus(log_p) * log_not
            return -(wanted * yes * (1.0 if weights is None else weights) + (1 - wanted) * no).mean()
        classes = labels.view(-1, 1)
        every = functional.log_softmax(logits, dim=1)
        log_p = every.gather(1, classes).squeeze(1)
        # log(1 - p) as the sum over the other classes: 1 - exp(log p) is 0 in float32 where p is within 6e-8 of 1.
        rest = every.masked_fill(torch.zeros_like(every, dtype=torch.bool).scatter(1, classes, True), float("-inf"))
        losses = -self._focus(torch.logsumexp(rest, dim=1)) * log_p
        if weights is None:
            return losses.mean()
        chosen = weights[classes.squeeze(1)]
        return (losses * chosen).sum() / chosen.sum()

    def _focus(self, log_miss: Tensor) -> Tensor:
        """(1 - p)^gamma from log(1 - p); constant 1 for gamma = 0, whose gradient is then exactly 0."""
        return torch.exp(self.gamma * log_miss) if self.gamma else torch.ones_like(log_miss)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {"gamma": self.gamma, **super().get_config_dict()}


class MultiLabelLoss(ClassLoss):
    """Mean of the binary cross-entropies of labels that do not exclude each other.

    Args:
        model: A classifier with problem_type "multi_label_classification".
        pos_weight: How much a label counts where it holds, one positive number a label; "balanced" for texts without
            it over texts with it in the training data; None for 1.

    Raises:
        ConfigError: If a weight is out of range, or the model is of another kind.
    """

    problems = (MULTI,)

    def __init__(self, model: CrossEncoder, pos_weight: Weights = None) -> None:
        super().__init__(model, pos_weight, "pos_weight")

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (N, C) logits and (N, C) labels of 0 and 1, a scalar."""
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weights)


class RegressionLoss(ClassLoss):
    """Mean squared error.

    Args:
        model: A classifier with problem_type "regression".

    Raises:
        ConfigError: If the model is of another kind.
    """

    problems = (REGRESSION,)

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__(model)

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (N, C) numbers and as many labels, a scalar."""
        return functional.mse_loss(logits, labels.to(logits.dtype).view_as(logits))

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {}


_LOSS_OF = {
    SINGLE: ("CrossEntropyLoss", "FocalLoss"),
    MULTI: ("MultiLabelLoss", "FocalLoss"),
    REGRESSION: ("RegressionLoss",),
}


def problem_of(model: CrossEncoder) -> str:
    """The model's problem_type; where its config has none, what transformers would make of its number of labels."""
    named = getattr(model.config, "problem_type", None)
    return str(named) if named else REGRESSION if model.num_labels == 1 else SINGLE


def default_loss(model: CrossEncoder, label_smoothing: float = 0.0) -> ClassLoss:
    """What transformers' own head would be trained with.

    Raises:
        ConfigError: If `label_smoothing` is given for a head without classes that exclude each other.
    """
    problem = problem_of(model)
    if problem == SINGLE:
        return CrossEntropyLoss(model, label_smoothing=label_smoothing)
    if label_smoothing:
        fix = "Leave it out: it spreads a target over classes that exclude each other"
        raise ConfigError(f"the model's problem_type is {problem}", where="label_smoothing_factor", fix=fix)
    return MultiLabelLoss(model) if problem == MULTI else RegressionLoss(model)
