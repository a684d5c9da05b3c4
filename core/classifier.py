"""A classifier of texts or pairs: the cross-encoder of `core.cross_encoder` whose head has classes, labels or a number.

What it saves is a plain `AutoModelForSequenceClassification` folder, which `transformers.pipeline` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import CrossEncoder as Stock
from torch import nn

from . import class_metrics, class_report
from .adapters import adapter_base
from .calibration import Calibration, check_temperature, fit_temperature, probabilities
from .class_data import Classes, check_problem, texts_and_labels
from .class_losses import MULTI, REGRESSION, SINGLE
from .class_metrics import RESAMPLES, THRESHOLD, ClassResult
from .classifier_head import scale_head
from .cross_encoder import CrossEncoder
from .environment import describe_environment
from .errors import ConfigError
from .files import write_json
from .loading import CLASSIFY

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from numpy.typing import NDArray

# What of Sentence Transformers' `predict` asks for scores: its evaluators and `rank` do.
_SCORING = ("activation_fn", "apply_softmax", "convert_to_numpy", "convert_to_tensor")
# Where the temperature is kept: in config.json, and beside an adapter in config_sentence_transformers.json.
_TEMPERATURE = "calibration_temperature"


class Classifier(CrossEncoder):
    """`CrossEncoder` for classes, several labels or a number, of single texts or pairs.

    Takes what `burnish.core.cross_encoder.CrossEncoder` takes, and:

    Args:
        model_name_or_path: A bare transformer, which gets a fresh head, or a classifier, Burnish's or any other.
        labels: The classes in the order of the head's outputs. None for those of the repository.
        num_labels: Instead of `labels`, where they have no names.
        problem_type: "single_label_classification", "multi_label_classification" or "regression"; None for what the
            repository says, else "regression" for one output and "single_label_classification" for more.

    Raises:
        ConfigError: If labels, number and problem_type do not go together, or none is given for a fresh head.
    """

    calibration: Calibration | None = None
    _saved_temperature: float | None = None

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        labels: Sequence[Any] | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        given = head_settings(labels, num_labels, problem_type)
        super().__init__(model_name_or_path, config_kwargs={**(config_kwargs or {}), **given}, **keywords)
        self._check_head(asked=labels is not None or num_labels is not None or problem_type == REGRESSION)
        assert self.config is not None
        self.config.id2label = dict(enumerate(self.labels))  # numbers, where an adapter's folder has them as text
        # Said, so that whoever reads the folder need not guess.
        self.config.problem_type = self.problem_type  # type: ignore[assignment]
        if self._saved_temperature is not None:
            self.temperature = self._saved_temperature

    @property
    def classes(self) -> Classes:
        """The names of the head's outputs, and the kind of label."""
        return Classes.of(self)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the head's outputs."""
        return self.classes.names

    @property
    def problem_type(self) -> str:
        """transformers' name for the kind of label."""
        return self.classes.problem

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; 1.0 where nothing was calibrated."""
        return float(getattr(self.config, _TEMPERATURE, None) or 1.0)

    @temperature.setter
    def temperature(self, value: float) -> None:
        assert self.config is not None
        number = check_temperature(value)
        if number == 1.0:
            self.config.__dict__.pop(_TEMPERATURE, None)
        else:
            setattr(self.config, _TEMPERATURE, number)

    def is_singular_input(self, inputs: Any) -> Any:  # type: ignore[override]
        """Whether it is one text or one pair (a tuple of two texts); a list is always several."""
        return isinstance(inputs, str | tuple | dict)

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *args: Any,
        **keywords: Any,
    ) -> Any:
        """Labels of texts or pairs.

        Args:
            inputs: One text, one pair (a tuple), or a list of either.
            prompt_name, prompt, batch_size, show_progress_bar: As Sentence Transformers takes them.
            threshold: For several labels a text: the probability from which a label is given, 0.5.
            device, pool, chunk_size: As Sentence Transformers takes them.
            activation_fn, apply_softmax, convert_to_numpy, convert_to_tensor: With one of these the result is what
                `sentence_transformers.CrossEncoder.predict` gives: scores. Its evaluators and `rank` pass them.

        Returns:
            For each text a class's name, a list of names, or a number.
        """
        common = (prompt_name, prompt, batch_size, show_progress_bar)
        if args or any(name in keywords for name in _SCORING):
            return Stock.predict(self, inputs, *common, *args, **keywords)
        threshold = keywords.pop("threshold", THRESHOLD)
        alone = self.is_singular_input(inputs)
        logits = self.logits([inputs] if alone else inputs, *common, **keywords)
        found = self._decoded(logits, threshold)
        return found[0] if alone else found

    def predict_proba(self, inputs: Any, **keywords: Any) -> NDArray[np.float64]:
        """Calibrated probabilities.

        Args:
            inputs: One text, one pair (a tuple), or a list of N of either.
            keywords: `batch_size`, `prompt` and what else Sentence Transformers' `predict` takes.

        Returns:
            (N, C) float64, (C,) for one text: shares that add up to 1, or for several labels one probability each.

        Raises:
            ConfigError: For a regression, whose head gives numbers.
        """
        if self.problem_type == REGRESSION:
            raise ConfigError("the model gives numbers, not classes", where="predict_proba", fix="Call predict")
        alone = self.is_singular_input(inputs)
        logits = self.logits([inputs] if alone else inputs, **keywords)
        table = probabilities(logits, self.temperature, multi_label=self.problem_type == MULTI)
        return table[0] if alone else table

    def logits(self, inputs: Any, *common: Any, **keywords: Any) -> NDArray[np.float64]:
        """(N, C) float64, what the head gives for N texts or pairs, before temperature and probabilities."""
        keywords |= {"activation_fn": nn.Identity(), "convert_to_numpy": True}
        found: Any = Stock.predict(self, list(inputs), *common, **keywords)
        return np.asarray(found, dtype=np.float64).reshape(len(found), -1 if len(found) else self.num_labels)

    def _decoded(self, logits: NDArray[np.float64], threshold: float) -> list[Any]:
        names = self.labels
        if self.problem_type == SINGLE:
            return [names[place] for place in logits.argmax(axis=1)]
        if self.problem_type == REGRESSION:
            return [float(row[0]) if len(row) == 1 else row.tolist() for row in logits]
        chosen = probabilities(logits, self.temperature, multi_label=True) >= threshold
        return [[name for name, one in zip(names, row, strict=True) if one] for row in chosen]

    def measure(
        self,
        dataset: datasets.Dataset,
        *,
        batch_size: int = 32,
        resamples: int = RESAMPLES,
        seed: int = 0,
        where: str = "dataset",
    ) -> ClassResult:
        """How good the model is on held-out texts: see `burnish.core.class_metrics`.

        Args:
            dataset: One or two text columns and a label.
            batch_size: Texts in a forward.
            resamples: Bootstrap samples for the intervals; 0 for none.
            seed: Of the samples.
            where: What errors call the data set.

        Raises:
            DataError: At the first row that cannot be measured on.
        """
        texts, labels = texts_and_labels(dataset, self.classes, where)
        return self._result(self.logits(texts, batch_size=batch_size), labels, resamples, seed)

    def _result(self, logits: NDArray[np.float64], labels: Any, resamples: int, seed: int) -> ClassResult:
        multi = self.problem_type == MULTI
        scores = (
            logits if self.problem_type == REGRESSION else probabilities(logits, self.temperature, multi_label=multi)
        )
        return class_metrics.measure(labels, scores, self.labels, self.problem_type, resamples=resamples, seed=seed)

    def calibrate(
        self, dataset: datasets.Dataset, *, batch_size: int = 32, fold: bool = False, where: str = "dataset"
    ) -> Calibration:
        """Fit one temperature on held-out texts, so that probabilities are as often right as they say.

        Predictions stay as they are. The temperature is saved with the model and used by `predict_proba`. transformers'
        pipeline does not know it: with `fold` it goes into the head's weights instead, and every reader has it.

        Args:
            dataset: Texts that were not trained on, with labels.
            batch_size: Texts in a forward.
            fold: Call `fold_temperature` too.
            where: What errors call the data set.

        Raises:
            ConfigError: For a regression.
            DataError: If no temperature fits.
        """
        if self.problem_type == REGRESSION:
            fix = "Calibrate a model with classes"
            raise ConfigError("the model gives numbers, which have no probabilities", where="calibrate", fix=fix)
        texts, labels = texts_and_labels(dataset, self.classes, where)
        logits = self.logits(texts, batch_size=batch_size)
        found = fit_temperature(logits, labels, multi_label=self.problem_type == MULTI)
        self.temperature, self.calibration = found.temperature, found
        if fold:
            self.fold_temperature()
        return found

    def fold_temperature(self) -> None:
        """Divide the head's last layer by the temperature, which is 1 afterwards; probabilities stay as they are.

        Raises:
            ModelError: If the head does not end in one linear layer whose weights can be changed.
        """
        scale_head(self, 1 / self.temperature)
        self.temperature = 1.0

    def report(
        self,
        dataset: datasets.Dataset,
        folder: str | Path,
        *,
        title: str | None = None,
        data: str = "",
        before: ClassResult | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, object] | None = None,
        notes: Sequence[str] = (),
        batch_size: int = 32,
        resamples: int = RESAMPLES,
    ) -> ClassResult:
        """Measure on held-out texts and write `report.html` and `metrics.json` into a folder.

        Args:
            dataset: One or two text columns and a label.
            folder: Made if it is not there.
            title, data: What the page calls the model's task, and the data.
            before: What `measure` returned on the same data before training, or for another model.
            history: `trainer.state.log_history`, for the course of the loss.
            settings: Hyper-parameters to show.
            notes: Sentences to show, such as where the data comes from.
            batch_size: Texts in a forward.
            resamples: Bootstrap samples for the intervals.

        Raises:
            ConfigError: If `before` is of other data, or the extra `report` is not installed.
            DataError: At the first row that cannot be measured on.
        """
        texts, labels = texts_and_labels(dataset, self.classes, data or "dataset")
        logits = self.logits(texts, batch_size=batch_size)
        result = self._result(logits, labels, resamples, 0)
        calibrated = self.temperature != 1.0
        name = Path(str(getattr(self.config, "_name_or_path", "")) or "model").name
        report = class_report.ClassReport(
            title=title or f"Classification with {name}",
            model=name,
            family=self.burnish.decision.family.family.name if self.burnish is not None else "",
            data=data,
            summary=class_report.summary_of(result, before),
            result=result,
            before=before,
            change=None if before is None else class_metrics.paired_change(before, result, resamples=resamples),
            raw=probabilities(logits, multi_label=self.problem_type == MULTI) if calibrated else None,
            calibration=self.calibration,
            texts=texts,
            history=history,
            environment=describe_environment(str(self.device)),
            settings=settings or {},
            notes=tuple(notes),
        )
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "metrics.json", {**result.as_json(), "temperature": self.temperature})
        class_report.write_class_report(target / "report.html", report)
        return result

    # What Sentence Transformers calls while it loads and saves.

    def get_default_activation_fn(self) -> Any:
        """What a plain CrossEncoder puts on the logits: a sigmoid for several labels, else nothing."""
        config = self.config
        if any(
            getattr(config, name, None) for name in ("sentence_transformers", "sbert_ce_default_activation_function")
        ):
            return super().get_default_activation_fn()
        return nn.Sigmoid() if self.problem_type == MULTI else nn.Identity()

    def _get_model_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._get_model_config()
        if self.temperature != 1.0 and adapter_base(self.transformers_model) is not None:
            config[_TEMPERATURE] = self.temperature  # no config.json is saved beside an adapter
        return config

    def _complete(self, folder: Path) -> None:
        super()._complete(folder)
        self._tell_temperature()

    def plain(self, modules: Any) -> Any:
        """Sentence Transformers' own model of these modules, as it is saved merged."""
        self._tell_temperature()
        return super().plain(modules)

    def _tell_temperature(self) -> None:
        if self.temperature != 1.0:
            said = f"Burnish reads the temperature {self.temperature:.4g} of calibrated probabilities back"
            print(f"burnish: {said}; for other programs call fold_temperature() before saving", file=sys.stderr)

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)
        self._saved_temperature = model_config.get(_TEMPERATURE)

    def _check_head(self, *, asked: bool) -> None:
        decision = self.burnish.decision if self.burnish is not None else None
        if decision is not None and decision.task != CLASSIFY:
            fix = "Load it with FastCrossEncoder, or the model that it was made from"
            raise ConfigError(f"the repository holds a model for {decision.task}", where="FastClassifier", fix=fix)
        if self.fresh and not asked and adapter_base(self.transformers_model) is None:  # an adapter brings its head
            fix = "Pass labels=['…', '…'] or num_labels, and problem_type where a text has several or a number"
            raise ConfigError("the repository has no head of its own", where="labels", fix=fix)
        if self.problem_type == SINGLE and self.num_labels < 2:
            raise ConfigError("one class cannot be told from others", where="labels", fix="Name two or more")


def head_settings(labels: Sequence[Any] | None, num_labels: int | None, problem_type: str | None) -> dict[str, Any]:
    """Entries of the config that make the head; empty where everything is left to the repository.

    Raises:
        ConfigError: If they do not go together.
    """
    names = None if labels is None else [str(one) for one in labels]
    if problem_type is not None or names is not None:
        check_problem(problem_type or SINGLE, names)
    if names is not None and num_labels is not None and len(names) != num_labels:
        what = f"{len(names)} labels and num_labels={num_labels}"
        raise ConfigError(what, where="labels, num_labels", fix="Pass labels alone")
    count = len(names) if names is not None else num_labels
    if count is None and problem_type == REGRESSION:
        count = 1
    if count is not None and count < 1:
        raise ConfigError(f"{count} labels", where="num_labels" if names is None else "labels", fix="Give one or more")
    if problem_type is None and count is not None:
        problem_type = REGRESSION if count == 1 and names is None else SINGLE
    if problem_type == SINGLE and count == 1:
        fix = "Name two or more, or pass problem_type='multi_label_classification' for one yes or no"
        raise ConfigError("one class cannot be told from others", where="labels", fix=fix)
    settings: dict[str, Any] = {} if count is None else {"num_labels": count}
    if names is not None:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    return settings | ({} if problem_type is None else {"problem_type": problem_type})


__all__ = ["Classifier", "head_settings"]
