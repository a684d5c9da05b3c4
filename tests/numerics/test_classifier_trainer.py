"""Training a classifier is what transformers' Trainer does: the same losses, step by step, and the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset  # type: ignore[import-untyped]
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from burnish import ClassifierTrainer, CrossEncoderTrainingArguments, FastClassifier
from burnish.core.class_losses import MULTI, REGRESSION, SINGLE, CrossEntropyLoss, MultiLabelLoss
from burnish.core.errors import ConfigError, DataError
from burnish.core.testing.tokenizer import words

from .crossing import make

ROWS, STEPS = 12, 4
FIRST = [words(1 + 7 * at % 23, at) for at in range(ROWS)]
SECOND = [words(2 + 5 * at % 31, 100 + at) for at in range(ROWS)]
LABELS: dict[str, list[Any]] = {
    SINGLE: [at % 3 for at in range(ROWS)],
    MULTI: [[float((at >> place) & 1) for place in range(3)] for at in range(ROWS)],
    REGRESSION: [at / ROWS for at in range(ROWS)],
}
STILL: dict[str, Any] = {
    name: 0.0
    for name in (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "classifier_dropout",
        "seq_classif_dropout",
    )
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "num_train_epochs": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "weight_decay": 0.01,
    "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


def rows(problem: str, *, pairs: bool) -> Dataset:
    texts = {"sentence1": FIRST, "sentence2": SECOND} if pairs else {"text": FIRST}
    return Dataset.from_dict({**texts, "label": LABELS[problem]})


def reference(
    folder: str, problem: str, data: Dataset, where: Path, optim: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of transformers' Trainer."""
    labels = 1 if problem == REGRESSION else 3
    model = AutoModelForSequenceClassification.from_pretrained(folder, problem_type=problem, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = [name for name in data.column_names if name != "label"]
    tokenised = data.map(lambda row: tokenizer(*(row[name] for name in columns), truncation=True))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(where), optim=optim, **SETTINGS),
        train_dataset=tokenised,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], dict(model.state_dict())


@pytest.mark.parametrize(
    ("model_type", "problem", "pairs", "optim"),
    [
        ("bert", SINGLE, True, "sgd"),
        ("bert", SINGLE, True, "adamw_torch"),
        ("bert", MULTI, False, "sgd"),
        ("bert", REGRESSION, True, "sgd"),
        ("distilbert", SINGLE, False, "sgd"),
        ("modernbert", SINGLE, True, "sgd"),
        ("xlm-roberta", SINGLE, False, "sgd"),
        ("qwen3", SINGLE, False, "sgd"),
    ],
)
def test_losses_and_weights_are_those_of_transformers(
    model_type: str, problem: Any, pairs: bool, optim: str, tmp_path: Path
) -> None:
    labels = 1 if problem == REGRESSION else 3
    folder = make(model_type, tmp_path / "model", labels, **STILL)
    data = rows(problem, pairs=pairs)
    wanted, weights = reference(folder, problem, data, tmp_path / "theirs", optim)
    model: Any = FastClassifier.from_pretrained(
        folder, full_finetuning=True, num_labels=labels, problem_type=problem, device="cpu"
    )
    before = {name: value.clone() for name, value in model[0].model.state_dict().items()}
    arguments = CrossEncoderTrainingArguments(str(tmp_path / "ours"), optim=optim, **SETTINGS)
    trainer: Any = ClassifierTrainer(model, arguments, data)
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == STEPS and len(set(found)) == STEPS
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)  # both log four digits
    moved = 0.0
    for name, value in model[0].model.state_dict().items():
        if optim != "sgd" and "key.bias" in name:
            continue  # attention does not change by it: its gradient is rounding, which AdamW makes whole steps of
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=2e-5 if optim == "sgd" else 2e-4)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 1e-3  # fifty times the tolerance


def test_names_smoothing_and_balance(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "model", 2)
    data = Dataset.from_dict({"text": FIRST[:4], "label": ["no", "yes", "no", "no"]})
    arguments = CrossEncoderTrainingArguments(str(tmp_path / "run"), **{**SETTINGS, "label_smoothing_factor": 0.1})
    model: Any = FastClassifier.from_pretrained(folder, full_finetuning=True, labels=["yes", "no"], device="cpu")
    trainer: Any = ClassifierTrainer(model, arguments, data)
    assert isinstance(trainer.loss, CrossEntropyLoss) and trainer.loss.label_smoothing == 0.1
    assert list(trainer.train_dataset["label"]) == [1, 0, 1, 1]
    with pytest.raises(ConfigError, match="label_smoothing_factor: a loss was given"):
        ClassifierTrainer(model, arguments, data, loss=CrossEntropyLoss(model))
    plain = CrossEncoderTrainingArguments(str(tmp_path / "run"), **SETTINGS)
    balanced = CrossEntropyLoss(model, class_weights="balanced")
    trainer = ClassifierTrainer(model, plain, data, loss=balanced)
    assert balanced.weights is not None
    np.testing.assert_allclose(balanced.weights.numpy(), [4 / 2, 4 / 6], rtol=1e-6)
    trainer.train()
    with pytest.raises(ConfigError, match="no training data to count"):
        ClassifierTrainer(model, plain, loss=CrossEntropyLoss(model, class_weights="balanced"))


def test_balance_of_several_data_sets(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "model", 2)
    model: Any = FastClassifier.from_pretrained(
        folder, full_finetuning=True, labels=["wet", "cold"], problem_type=MULTI, device="cpu"
    )
    data = {
        "one": Dataset.from_dict({"text": FIRST[:3], "label": [["wet"], ["wet", "cold"], ["cold"]]}),
        "two": Dataset.from_dict({"text": FIRST[:3], "label": [["wet"], ["cold"], ["cold"]]}),
    }
    losses = {name: MultiLabelLoss(model, pos_weight="balanced") for name in data}
    arguments = CrossEncoderTrainingArguments(str(tmp_path / "run"), **{**SETTINGS, "num_train_epochs": 1})
    trainer: Any = ClassifierTrainer(model, arguments, data, loss=losses)
    assert all(loss.weights is not None for loss in losses.values())
    torch.testing.assert_close(losses["one"].weights, torch.tensor([1 / 2, 1 / 2]))
    torch.testing.assert_close(losses["two"].weights, torch.tensor([2, 1 / 2]))
    trainer.train()


def test_a_bad_row_stops_before_anything_is_trained(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "model", 2)
    model: Any = FastClassifier.from_pretrained(folder, full_finetuning=True, labels=["yes", "no"], device="cpu")
    good = Dataset.from_dict({"text": FIRST[:2], "label": ["yes", "no"]})
    bad = Dataset.from_dict({"text": FIRST[:2], "label": ["yes", "perhaps"]})
    with pytest.raises(DataError, match="eval_dataset, row 2, column label"):
        ClassifierTrainer(model, train_dataset=good, eval_dataset=bad)
    with pytest.raises(DataError, match=r"train_dataset\['b'\], row 2, column label"):
        ClassifierTrainer(model, train_dataset={"a": good, "b": bad})
    with pytest.raises(ConfigError, match="model: no model was given"):
        ClassifierTrainer(train_dataset=good)


def test_a_column_that_is_no_text_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make("bert", tmp_path / "model", 2)
    model: Any = FastClassifier.from_pretrained(folder, full_finetuning=True, labels=["yes", "no"], device="cpu")
    data = Dataset.from_dict({"idx": [0, 1], "text": FIRST[:2], "label": [0, 1]})
    data = data.cast_column("label", ClassLabel(names=["no", "yes"]))
    trainer: Any = ClassifierTrainer(model, CrossEncoderTrainingArguments(str(tmp_path / "run"), **SETTINGS), data)
    assert "burnish: train_dataset: columns left out: idx" in capsys.readouterr().err
    assert trainer.train_dataset[0] == {"text": FIRST[0], "label": 1}
