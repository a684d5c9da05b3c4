"""A classifier as a user meets it: labels, probabilities, what is saved and who reads it, calibration, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder as Plain
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
from transformers import AutoModelForSequenceClassification, pipeline

from burnish import Classifier, ClassifierTrainer, CrossEncoderTrainingArguments, FastClassifier
from burnish.core.class_evaluator import ClassificationEvaluator
from burnish.core.errors import ConfigError, DataError, ModelError

NAMES = ["bird", "cat", "dog"]
MULTI: Any = "multi_label_classification"
TEXTS = ["it sings in the tree", "it sleeps all day and purrs", "it runs after the ball", "feathers", "a cat", "woof"]
PAIRS = [("what sings", "a bird"), ("who purrs all day", "the cat next door"), ("woof", "dog")]


def load(folder: Path, **settings: Any) -> Any:
    return FastClassifier.from_pretrained(str(folder), device="cpu", full_finetuning=True, **settings).eval()


def alive(model: Any) -> Any:
    """Random weights, of those that train, which tell texts apart: fresh heads and adapters hardly do."""
    for name, value in model.named_parameters():
        if value.requires_grad and "LayerNorm" not in name:
            with torch.no_grad():
                value.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.3)
    return model


def scores(found: Any, names: list[str] = NAMES) -> np.ndarray:
    return np.array([[next(one["score"] for one in row if one["label"] == name) for name in names] for row in found])


def read_by_transformers(folder: Path, inputs: Any) -> np.ndarray:
    return scores(pipeline("text-classification", model=str(folder), top_k=None, device="cpu")(inputs))


def as_pipeline_takes(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"text": first, "text_pair": second} for first, second in pairs]


def test_labels_and_probabilities(tiny_bert: Path) -> None:
    model = alive(load(tiny_bert, labels=NAMES))
    assert isinstance(model, Classifier) and isinstance(model, Plain)
    assert model.labels == tuple(NAMES) and model.problem_type == "single_label_classification"
    table = model.predict_proba(TEXTS)
    assert table.shape == (6, 3) and table.dtype == np.float64
    np.testing.assert_allclose(table.sum(axis=1), 1)
    assert np.ptp(table, axis=0).max() > 0.05
    assert model.predict(TEXTS) == [NAMES[place] for place in table.argmax(axis=1)]
    assert model.predict(TEXTS[1]) == model.predict(TEXTS)[1]
    np.testing.assert_allclose(model.predict_proba(TEXTS[1]), table[1], atol=1e-6)
    assert model.predict(PAIRS[0]) == model.predict(PAIRS)[0]  # a tuple is one pair, a list is several texts
    assert model.predict_proba([]).shape == (0, 3) and model.predict([]) == []
    # Asked as Sentence Transformers asks, it answers as Sentence Transformers does.
    logits = model.predict(TEXTS, convert_to_numpy=True)
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), table, atol=1e-5)
    found = CrossEncoderClassificationEvaluator([list(pair) for pair in PAIRS], [0, 1, 2], write_csv=False)(model)
    assert set(found) == {"f1_macro", "f1_micro", "f1_weighted"}


def test_several_labels_a_text_and_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    model = alive(load(tiny_bert, labels=NAMES, problem_type=MULTI))
    table = model.predict_proba(TEXTS)
    assert abs(table.sum(axis=1) - 1).max() > 0.1
    assert model.predict(TEXTS, threshold=0.3) == [
        [name for name, share in zip(NAMES, row, strict=True) if share >= 0.3] for row in table
    ]
    model.save_pretrained(str(tmp_path / "tags"))
    np.testing.assert_allclose(read_by_transformers(tmp_path / "tags", TEXTS), table, atol=1e-5)
    plain = Plain(str(tmp_path / "tags"), device="cpu")
    np.testing.assert_allclose(plain.predict(PAIRS), model.predict_proba(PAIRS), atol=1e-5)
    number = alive(load(tiny_bert, problem_type="regression"))
    given = number.predict(TEXTS)
    assert all(isinstance(one, float) for one in given) and np.ptp(given) > 0.01
    with pytest.raises(ConfigError, match="predict_proba: the model gives numbers"):
        number.predict_proba(TEXTS)
    number.save_pretrained(str(tmp_path / "number"))
    read = pipeline("text-classification", model=str(tmp_path / "number"), device="cpu")(TEXTS)
    np.testing.assert_allclose([one["score"] for one in read], given, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_saved_is_a_plain_classifier(adapter: bool, tiny_bert: Path, tmp_path: Path) -> None:
    if adapter:
        model = FastClassifier.from_pretrained(str(tiny_bert), device="cpu", labels=NAMES)
        model = alive(FastClassifier.get_peft_model(model, r=4)).eval()
    else:
        model = alive(load(tiny_bert, labels=NAMES))
    wanted, pairs = model.predict_proba(TEXTS), model.predict_proba(PAIRS)
    model.save_pretrained_merged(str(tmp_path / "merged"))
    np.testing.assert_allclose(read_by_transformers(tmp_path / "merged", TEXTS), wanted, atol=1e-5)
    found = read_by_transformers(tmp_path / "merged", as_pipeline_takes(PAIRS))
    np.testing.assert_allclose(found, pairs, atol=1e-5)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config
    assert config.id2label == dict(enumerate(NAMES)) and config.label2id == {"bird": 0, "cat": 1, "dog": 2}
    assert config.problem_type == "single_label_classification"
    assert not list((tmp_path / "merged").glob("adapter*"))
    model.save_pretrained(str(tmp_path / "saved"))
    assert bool(list((tmp_path / "saved").glob("adapter*"))) == adapter
    for folder in ("merged", "saved"):
        again = FastClassifier.from_pretrained(str(tmp_path / folder), device="cpu", for_inference=True)
        assert again.labels == tuple(NAMES) and again.problem_type == "single_label_classification"
        np.testing.assert_allclose(again.predict_proba(TEXTS), wanted, atol=1e-5)


def test_an_adapter_is_trained_on(tiny_bert: Path, tmp_path: Path) -> None:
    model = FastClassifier.from_pretrained(str(tiny_bert), device="cpu", labels=NAMES)
    model = alive(FastClassifier.get_peft_model(model, r=4)).eval()
    wanted = model.predict_proba(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    again = FastClassifier.from_pretrained(str(tmp_path / "saved"), device="cpu").eval()
    assert again.labels == tuple(NAMES)
    np.testing.assert_allclose(again.predict_proba(TEXTS), wanted, atol=1e-5)
    data = Dataset.from_dict({"text": TEXTS, "label": ["bird", "cat", "dog"] * 2})
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    ClassifierTrainer(again, arguments, data).train()
    assert np.abs(again.eval().predict_proba(TEXTS) - wanted).max() > 1e-3


def held_out(model: Any, texts: int = 60) -> Dataset:
    """Texts whose labels the model knows three times in four."""
    lines = [f"{TEXTS[at % 6]} {at}" for at in range(texts)]
    known = model.predict(lines)
    other = [NAMES[(NAMES.index(name) + 1) % 3] for name in known]
    return Dataset.from_dict({"text": lines, "label": [other[at] if at % 4 == 0 else known[at] for at in range(texts)]})


@pytest.mark.parametrize("adapter", [False, True])
def test_calibrated_probabilities_are_saved(
    adapter: bool, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FastClassifier.from_pretrained(str(tiny_bert), device="cpu", labels=NAMES, full_finetuning=not adapter)
    if adapter:
        model = FastClassifier.get_peft_model(model, r=4)
    alive(model).eval()
    data = held_out(model)
    raw, labels = model.predict_proba(TEXTS), model.predict(TEXTS)
    found = model.calibrate(data)
    assert model.temperature == found.temperature != 1.0 and found.texts == 60
    calibrated = model.predict_proba(TEXTS)
    assert np.abs(calibrated - raw).max() > 0.01 and model.predict(TEXTS) == labels
    capsys.readouterr()
    for save, folder in ((model.save_pretrained, "saved"), (model.save_pretrained_merged, "merged")):
        save(str(tmp_path / folder))
        assert "call fold_temperature() before saving" in capsys.readouterr().err
        again = FastClassifier.from_pretrained(str(tmp_path / folder), device="cpu", for_inference=True)
        assert again.temperature == pytest.approx(found.temperature)
        np.testing.assert_allclose(again.predict_proba(TEXTS), calibrated, atol=1e-5)
    np.testing.assert_allclose(read_by_transformers(tmp_path / "merged", TEXTS), raw, atol=1e-5)
    model.fold_temperature()
    assert model.temperature == 1.0
    np.testing.assert_allclose(model.predict_proba(TEXTS), calibrated, atol=1e-5)
    model.save_pretrained_merged(str(tmp_path / "folded"))
    assert "fold_temperature" not in capsys.readouterr().err
    np.testing.assert_allclose(read_by_transformers(tmp_path / "folded", TEXTS), calibrated, atol=1e-5)


def test_a_head_that_is_not_linear_is_not_folded_into(tiny_bert: Path) -> None:
    model = alive(load(tiny_bert, labels=NAMES))
    head = model[0].model.classifier
    before = head.weight.clone()
    model.temperature = 2.0
    head.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(ModelError, match="fold_temperature: its logits are not the outputs of one linear layer"):
        model.fold_temperature()
    assert torch.equal(head.weight, before) and model.temperature == 2.0
    model[0].model.classifier = torch.nn.Sequential(torch.nn.Bilinear(32, 32, 3))
    with pytest.raises(ModelError, match="its head has no linear layer with 3 outputs"):
        model.fold_temperature()


def test_the_best_model_is_picked_by_a_figure(tiny_bert: Path, tmp_path: Path) -> None:
    model = load(tiny_bert, labels=NAMES)
    data = Dataset.from_dict({"text": TEXTS, "label": ["bird", "cat", "dog"] * 2})
    evaluator = ClassificationEvaluator(data, name="dev")
    trainer = ClassifierTrainer(
        model,
        CrossEncoderTrainingArguments(
            str(tmp_path / "run"), num_train_epochs=3, learning_rate=5e-3, per_device_train_batch_size=3,
            eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="eval_dev_macro_f1", report_to="none", use_cpu=True, dataloader_pin_memory=False,
        ),
        train_dataset=data,
        evaluator=evaluator,
    )  # fmt: skip
    trainer.train()
    figures = [row["eval_dev_macro_f1"] for row in trainer.state.log_history if "eval_dev_macro_f1" in row]
    assert len(figures) == 3 and trainer.state.best_metric == max(figures)
    assert evaluator.primary_metric == "dev_macro_f1"
    assert model.measure(data, resamples=0).metrics["macro_f1"].mean == pytest.approx(max(figures))
    lines = next((tmp_path / "run").rglob("classification_evaluation_dev_results.csv")).read_text().splitlines()
    assert lines[0] == "epoch,steps,accuracy,macro_f1,auroc" and len(lines) == 4


def test_the_report(tiny_bert: Path, tmp_path: Path) -> None:
    model = alive(load(tiny_bert, labels=NAMES))
    data = held_out(model)
    before = model.measure(data, resamples=20)
    model.calibrate(data)
    history = [{"step": step, "loss": 1 / step} for step in range(1, 8)]
    result = model.report(
        data, tmp_path / "report", before=before, history=history, notes=["<b>mind</b>"], resamples=20
    )  # fmt: skip
    assert result.metrics["accuracy"].mean == 0.75 == before.metrics["accuracy"].mean
    saved = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert saved["accuracy"] == 0.75 and saved["temperature"] == model.temperature and len(saved["classes"]) == 3
    page = (tmp_path / "report" / "report.html").read_text()
    for part in ("Which class is taken for which", "calibrated, expected error", "Most frequent confusions", "bird",
                 "Training loss", "no clear change", "&lt;b&gt;mind"):  # fmt: skip
        assert part in page, part
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_reports_of_other_problems(tiny_bert: Path, tmp_path: Path) -> None:
    tags = alive(load(tiny_bert, labels=NAMES, problem_type=MULTI))
    data = Dataset.from_dict({"text": TEXTS, "label": [["bird"], ["cat", "dog"], ["dog"], [], ["cat"], ["dog"]]})
    found = tags.report(data, tmp_path / "tags", resamples=10)
    page = (tmp_path / "tags" / "report.html").read_text()
    assert found.confusion is None and "Every label right" in page and "taken for which" not in page
    number = alive(load(tiny_bert, problem_type="regression"))
    data = Dataset.from_dict({"text": TEXTS, "score": [0.1, 0.5, 0.2, 0.9, 0.4, 0.3]})
    number.report(data, tmp_path / "number", resamples=10)
    page = (tmp_path / "number" / "report.html").read_text()
    assert "Predicted beside actual" in page and "Spearman" in page and "Class by class" not in page
    with pytest.raises(ConfigError, match="calibrate: the model gives numbers"):
        number.calibrate(data)


@pytest.mark.usefixtures("quantises")
def test_over_four_bits(tiny_bert: Path, tmp_path: Path) -> None:
    model = FastClassifier.from_pretrained(str(tiny_bert), device="cpu", labels=NAMES, load_in_4bit=True)
    model = alive(FastClassifier.get_peft_model(model, r=4))
    data = Dataset.from_dict({"text": TEXTS, "label": ["bird", "cat", "dog"] * 2})
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    assert any("classifier" in name for name in before) and any("lora_A" in name for name in before)
    ClassifierTrainer(model, arguments, data).train()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    model.eval()
    model.save_pretrained_merged(str(tmp_path / "merged"))
    found = read_by_transformers(tmp_path / "merged", TEXTS)
    np.testing.assert_allclose(found, model.predict_proba(TEXTS), atol=0.02)  # the base is dense there, in 4 bits here


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "labels: the repository has no head of its own"),
        ({"labels": ["a"]}, "labels: one class cannot be told from others"),
        ({"labels": ["a", "b", "a"]}, "labels: 'a' occurs twice"),
        ({"labels": ["a", "b"], "num_labels": 3}, "labels, num_labels: 2 labels and num_labels=3"),
        ({"num_labels": 0}, "num_labels: 0 labels"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "one class cannot be told"),
        ({"num_labels": 2, "problem_type": "binary"}, "problem_type: 'binary' is unknown"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(settings: dict[str, Any], said: str, tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tiny_bert, **settings)


def test_a_bad_row_is_one_line(tiny_bert: Path) -> None:
    model = load(tiny_bert, labels=NAMES)
    with pytest.raises(DataError, match="dataset, row 2, column label: label is none of the 3 classes"):
        model.measure(Dataset.from_dict({"text": TEXTS[:2], "label": ["cat", "cow"]}))
