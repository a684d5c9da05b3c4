"""A classifier trained in CUDA graphs learns what the reference backend learns, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]

from burnish import ClassifierTrainer, CrossEncoderTrainingArguments, FastClassifier
from burnish.core.class_losses import ClassLoss, CrossEntropyLoss, FocalLoss, MultiLabelLoss

pytestmark = [pytest.mark.gpu]

NAMES, ROWS, STEPS = ["bird", "cat", "dog"], 96, 12
TEXTS = [f"text number {at} about {NAMES[at % 3]} and " + "more and more words " * (at % 7) for at in range(ROWS)]
SINGLE: Any = "single_label_classification"
MULTI: Any = "multi_label_classification"


def losses(
    minilm: Path, folder: Path, backend: str, kind: type[ClassLoss], problem: Any, settings: dict[str, Any]
) -> tuple[list[float], Any]:
    """The logged losses of a run without dropout, and its trainer."""
    model = FastClassifier.from_pretrained(
        str(minilm), full_finetuning=True, labels=NAMES, problem_type=problem, backend=backend, dtype="float32"
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = [
        NAMES[at % 3] if problem == SINGLE else [NAMES[at % 3], NAMES[at % 2]][: 1 + at % 2] for at in range(ROWS)
    ]
    if problem == MULTI:
        labels = [sorted(set(names)) for names in labels]
    arguments = CrossEncoderTrainingArguments(
        str(folder / backend), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-4, logging_steps=1,
        report_to="none", save_strategy="no", seed=1,
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS, "label": labels})
    trainer = ClassifierTrainer(model, arguments, data, loss=kind(model, **settings))
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize(
    ("kind", "problem", "settings"),
    [
        (CrossEntropyLoss, SINGLE, {"class_weights": "balanced", "label_smoothing": 0.1}),
        (FocalLoss, SINGLE, {"class_weights": [1.0, 2.0, 0.5]}),
        (MultiLabelLoss, MULTI, {"pos_weight": "balanced"}),
    ],
)
def test_graphs_learn_what_the_reference_learns(
    kind: type[ClassLoss], problem: Any, settings: dict[str, Any], minilm: Path, tmp_path: Path
) -> None:
    wanted, _ = losses(minilm, tmp_path, "reference", kind, problem, settings)
    found, trainer = losses(minilm, tmp_path, "fused", kind, problem, settings)
    assert len(found) == STEPS and wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3)  # four digits are logged, twelve steps add up
    assert trainer.engine.counts["replayed"] >= 1, trainer.engine.counts
