"""The trainer of classifiers: `CrossEncoderTrainer` that knows what labels mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sentence_transformers import CrossEncoder as Stock

from .class_data import Classes, prepare
from .class_losses import ClassLoss, default_loss
from .cross_encoder_trainer import CrossEncoderTrainer
from .errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class ClassifierTrainer(CrossEncoderTrainer):
    """`burnish.CrossEncoderTrainer` for classes, several labels a text, or numbers.

    Takes the same parameters. A batch's loss, its gradient and the optimizer's steps are those of transformers'
    `Trainer` on `AutoModelForSequenceClassification`, if `loss` is left out.

    Args:
        model: From `FastClassifier.from_pretrained`.
        args: `burnish.CrossEncoderTrainingArguments`, or Sentence Transformers' own. `label_smoothing_factor` acts.
        train_dataset, eval_dataset: One or two text columns and a label (`burnish.core.class_data`), or several such
            data sets by name. Every row is checked here.
        loss: A loss of `burnish.core.class_losses`, whose "balanced" weights are counted from `train_dataset` here, or
            any other of a cross-encoder. None is what the model's problem_type says.

    Raises:
        ConfigError: If the model is no cross-encoder, or settings do not go together.
        DataError: At the first row that cannot be trained on.
    """

    loaded_by: ClassVar[str] = "FastClassifier"

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        *others: Any,
        **keywords: Any,
    ) -> None:
        if not isinstance(model, Stock):
            found = "no model" if model is None else f"a {type(model).__name__}"
            raise ConfigError(f"{found} was given", where="model", fix="Load one with FastClassifier.from_pretrained")
        self._classes = Classes.of(model)
        self._smoothing = float(getattr(args, "label_smoothing_factor", 0.0) or 0.0)
        if loss is not None and self._smoothing:
            fix = "Pass it to the loss, CrossEntropyLoss(model, label_smoothing=…), or leave the loss out"
            raise ConfigError("a loss was given, which it does not reach", where="label_smoothing_factor", fix=fix)
        self._told: list[str] = []
        train_dataset = self._prepared(train_dataset, "train_dataset")
        eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        super().__init__(model, args, train_dataset, eval_dataset, loss, *others, **keywords)
        for line in self._told:
            self._say(line)
        self._count(train_dataset)

    def get_default_loss(self, model: Any) -> nn.Module:
        """What transformers' own head is trained with."""
        return default_loss(model, self._smoothing)

    def _prepared(self, dataset: Any, where: str) -> Any:
        from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]

        if isinstance(dataset, Dataset):
            return prepare(dataset, self._classes, where, self._told.append)
        if isinstance(dataset, Mapping):
            parts = {name: self._prepared(part, f"{where}[{name!r}]") for name, part in dataset.items()}
            return DatasetDict(parts) if isinstance(dataset, DatasetDict) else parts
        return dataset  # None, or what Sentence Transformers refuses

    def _count(self, dataset: Any) -> None:
        """Let losses with "balanced" weights count the labels that they will see."""
        losses = self.loss if isinstance(self.loss, dict) else {"": self.loss}
        for name, loss in losses.items():
            waiting = [one for one in loss.modules() if isinstance(one, ClassLoss) and one.waits]
            if not waiting:
                continue
            if dataset is None:
                fix = "Pass train_dataset, or give the weights as numbers"
                raise ConfigError("there is no training data to count", where="class_weights='balanced'", fix=fix)
            parts = dataset if isinstance(dataset, Mapping) else {name: dataset}
            chosen = [parts[name]] if name in parts else list(parts.values())
            labels = [label for part in chosen for label in part["label"][:]]
            for one in waiting:
                one.count(labels)


__all__ = ["ClassifierTrainer"]
