"""`burnish.CrossEncoderTrainer` against Sentence Transformers' own: whole runs of the real MiniLM, and what stays."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder as Stock
from sentence_transformers.cross_encoder import CrossEncoderTrainer as StockTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as StockArguments
from sentence_transformers.cross_encoder import losses
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from torch import nn

import burnish
from burnish.core.arguments import CrossEncoderTrainingArguments
from burnish.core.cross_encoder_trainer import CrossEncoderTrainer
from burnish.core.errors import ConfigError, ModelError
from burnish.core.fast_cross_encoder import FastCrossEncoder

TEXT = "which river runs through Paris and who painted the old bridge near München while it rained all day"
WORDS = TEXT.split()
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))


@pytest.fixture(scope="module")
def lists() -> Any:
    """Queries with one to five documents; a document that shares words with the query is graded higher."""
    draw = random.Random(0)
    rows = []
    for _ in range(64):
        query = sentence(draw, 8)
        docs = [sentence(draw, 40) for _ in range(draw.randint(1, 4))] + [f"{query} {sentence(draw, 12)}"]
        draw.shuffle(docs)
        rows.append({"query": query, "docs": docs, "labels": [float(doc.startswith(query)) for doc in docs]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def pairs(lists: Any) -> Any:
    """The same as pairs with a label."""
    return Dataset.from_list(
        [
            {"query": row["query"], "answer": doc, "label": label}
            for row in lists
            for doc, label in zip(row["docs"], row["labels"], strict=True)
        ]
    )


@pytest.fixture(scope="module")
def folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a head for one label, without dropout."""
    torch.manual_seed(0)
    model = Stock(str(minilm), num_labels=1, device="cpu", max_length=64, config_kwargs=NO_DROPOUT)
    assert model.model is not None
    with torch.no_grad():  # a fresh head's scores are all alike
        nn.init.normal_(model.model.get_submodule("classifier").get_parameter("weight"), std=0.1)
    place = tmp_path_factory.mktemp("minilm-ce") / "model"
    model.save_pretrained(str(place))
    return place


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    """Train `model`; returns (trainer, the loss of every step)."""

    def fit(model: Any, data: Any, make: Any, **settings: Any) -> Any:
        ours = not type(model).__module__.startswith("sentence_transformers.")
        kind = settings.pop("kind", CrossEncoderTrainer if ours else StockTrainer)
        arguments = settings.pop("arguments", CrossEncoderTrainingArguments if ours else StockArguments)
        passed = {name: settings.pop(name) for name in ("evaluator", "eval_dataset", "callbacks") if name in settings}
        resume = settings.pop("resume", None)
        settings = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 5, "logging_steps": 1,
            "learning_rate": 2e-4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
            **settings,
        }  # fmt: skip
        trainer = kind(model, arguments(**settings), train_dataset=data, loss=make(model), **passed)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return fit


def full(folder: Path) -> Any:
    return FastCrossEncoder.from_pretrained(str(folder), full_finetuning=True, backend="reference", device="cpu")


def adapted(folder: Path) -> Any:
    model = FastCrossEncoder.from_pretrained(str(folder), backend="reference", device="cpu")
    return FastCrossEncoder.get_peft_model(model, r=8)


def plain(folder: Path, like: Any) -> Any:
    """Sentence Transformers' model with the same weights and, where `like` has one, the same adapter."""
    model: Any = Stock(str(folder), device="cpu")
    if config := getattr(like[0].model, "peft_config", None):
        model.add_adapter(copy.deepcopy(config["default"]))
    missing, unexpected = model.load_state_dict(like.state_dict(), strict=False)
    assert not missing and not unexpected
    trained = {name for name, weight in like.named_parameters() if weight.requires_grad}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    return model


@pytest.mark.parametrize("make", [losses.LambdaLoss, losses.BinaryCrossEntropyLoss])
@pytest.mark.parametrize("load", [full, adapted])
def test_a_run_is_sentence_transformers_own(
    load: Any, make: Any, folder: Path, lists: Any, pairs: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lists if make is losses.LambdaLoss else pairs
    model = load(folder)
    stock = plain(folder, model)
    expected = fit(stock, data, make)[1]
    trainer, found = fit(model, data, make)
    said = capsys.readouterr().err
    assert "tokens, tokenised in" in said or "tokens, found tokenised in" in said
    assert model.burnish.packed is not None and trainer._pairs is not None
    assert len(found) == 5 and len({round(loss, 4) for loss in expected}) == 5, "the weights must move"
    # Float32 in another order of sums: 1e-4 after five steps of AdamW, which makes much of small gradients.
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    texts = [("who painted it?", "the old bridge near Paris"), ("rain", "it rained all day")]
    np.testing.assert_allclose(model.predict(texts), stock.predict(texts), atol=2e-4)


def test_a_plain_model_trains_as_sentence_transformers_trains_it(folder: Path, pairs: Any, fit: Any) -> None:
    both = []
    for kind in (StockTrainer, CrossEncoderTrainer):
        model = Stock(str(folder), device="cpu")
        both.append(fit(model, pairs, losses.BinaryCrossEntropyLoss, kind=kind)[1])
    assert both[0] == both[1]


@pytest.mark.parametrize("load", [full, adapted])
def test_a_run_goes_on_from_its_checkpoint(load: Any, folder: Path, lists: Any, fit: Any, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    first, whole = fit(load(folder), lists, losses.ListNetLoss, **settings)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    again, rest = fit(
        load(folder), lists, losses.ListNetLoss, **settings, resume=str(tmp_path / "run" / "checkpoint-2")
    )
    assert again.state.global_step == 5
    np.testing.assert_allclose(rest[-3:], whole[-3:], rtol=1e-6)
    pair = [("which river?", "the one that runs through Paris")]
    np.testing.assert_allclose(first.model.predict(pair), again.model.predict(pair), atol=1e-6)


def test_evaluation_and_the_best_model(folder: Path, lists: Any, pairs: Any, fit: Any, tmp_path: Path) -> None:
    samples = [
        {
            "query": row["query"],
            "positive": [doc for doc, label in zip(row["docs"], row["labels"], strict=True) if label],
            "negative": [doc for doc, label in zip(row["docs"], row["labels"], strict=True) if not label],
        }
        for row in lists
        if len(row["docs"]) > 2
    ][:16]
    evaluator = CrossEncoderRerankingEvaluator(samples, name="held", show_progress_bar=False)
    model = full(folder)
    before = evaluator(model)["held_ndcg@10"]
    trainer, _ = fit(
        model, pairs, losses.BinaryCrossEntropyLoss, evaluator=evaluator, eval_dataset=pairs.select(range(8)),
        eval_strategy="steps", eval_steps=8, save_strategy="steps", save_steps=8, max_steps=24,
        load_best_model_at_end=True, metric_for_best_model="eval_held_ndcg@10", learning_rate=1e-4, warmup_steps=3,
    )  # fmt: skip
    rows = [row for row in trainer.state.log_history if "eval_held_ndcg@10" in row]
    best = max(row["eval_held_ndcg@10"] for row in rows)
    assert best > before + 0.05, "it learns that documents with the query's words are the better ones"
    assert len([row for row in trainer.state.log_history if "eval_loss" in row]) == 3
    assert evaluator(trainer.model)["held_ndcg@10"] == pytest.approx(best, abs=1e-6), "the best is loaded"
    stock = Stock(trainer.state.best_model_checkpoint, device="cpu")
    assert evaluator(stock)["held_ndcg@10"] == pytest.approx(best, abs=1e-6), "and stock reads the checkpoint"


def test_data_sets_that_cannot_be_stored_are_refused_as_theirs(folder: Path, pairs: Any) -> None:
    streamed = pairs.to_iterable_dataset()
    for kind, model in ((StockTrainer, Stock(str(folder), device="cpu")), (CrossEncoderTrainer, full(folder))):
        trainer: Any = kind
        with pytest.raises(ValueError, match="does not support an IterableDataset for the `train_dataset`"):
            trainer(model, train_dataset=streamed, loss=losses.BinaryCrossEntropyLoss(model))


def test_several_data_sets_with_a_loss_each(folder: Path, lists: Any, pairs: Any, fit: Any) -> None:
    def make(model: Any) -> Any:
        return {"lists": losses.RankNetLoss(model), "pairs": losses.BinaryCrossEntropyLoss(model)}

    both = []
    for model in (Stock(str(folder), device="cpu"), full(folder)):
        data = DatasetDict(lists=lists.select(range(24)), pairs=pairs.select(range(24)))
        both.append(fit(model, data, make, multi_dataset_batch_sampler="round_robin")[1])
    np.testing.assert_allclose(both[1], both[0], rtol=1e-4)


def test_what_is_tokenised_batch_by_batch_is_said(
    folder: Path, pairs: Any, fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = full(folder)
    losses_of: Any = losses.BinaryCrossEntropyLoss
    fit(model, pairs.with_transform(lambda rows: rows), losses_of, max_steps=1)
    assert "pairs are tokenised batch by batch: the data set has a transform" in capsys.readouterr().err
    model.pad_inputs("a test")
    fit(model, pairs, losses_of, max_steps=1)
    assert "pairs are tokenised batch by batch: the input is padded" in capsys.readouterr().err
    trainer, _ = fit(full(folder), pairs, losses_of, max_steps=1, token_store=False)
    assert "tokenised" not in capsys.readouterr().err and trainer._pairs is None


def test_the_texts_of_a_data_set_are_stored_once(folder: Path, lists: Any, fit: Any, tmp_path: Path) -> None:
    store = tmp_path / "tokens"
    trainer, _ = fit(full(folder), lists, losses.LambdaLoss, max_steps=1, token_store=str(store))
    assert trainer.tokenise_seconds > 0 and len(list(store.glob("*/tokens.arrow"))) == 2
    trainer, _ = fit(full(folder), lists, losses.ADRMSELoss, max_steps=1, token_store=str(store))
    assert trainer.tokenise_seconds == 0


def test_weights_are_stepped_in_the_backward_however_often_the_loss_goes_forward(
    folder: Path, lists: Any, pairs: Any, fit: Any
) -> None:
    def parts(model: Any) -> Any:
        return losses.LambdaLoss(model, mini_batch_size=5)

    settings = {"max_steps": 3, "max_grad_norm": 0.0}
    usual = fit(full(folder), lists, parts, **settings)[1]
    within = fit(full(folder), lists, parts, **settings, optimizer_in_backward=True)[1]
    np.testing.assert_allclose(within, usual, rtol=1e-5)
    assert len(set(usual)) == 3
    cached: Any = losses.CachedMultipleNegativesRankingLoss
    with pytest.raises(ConfigError, match="optimizer_in_backward: CachedMultipleNegativesRankingLoss goes back"):
        fit(full(folder), pairs.remove_columns("label"), cached, **settings, optimizer_in_backward=True)


def test_what_is_refused(folder: Path, pairs: Any, tmp_path: Path) -> None:
    where = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^auto_batch: is not for cross-encoders"):
        CrossEncoderTrainingArguments(where, auto_batch=True)
    with pytest.raises(ConfigError, match=r"^token_store: 3 is neither"):
        CrossEncoderTrainingArguments(where, token_store=3)  # type: ignore[arg-type]
    model = FastCrossEncoder.from_pretrained(str(folder), device="cpu", for_inference=True)
    with pytest.raises(ModelError, match="for_inference=True"):
        CrossEncoderTrainer(model, train_dataset=pairs)
    model = full(folder).requires_grad_(False)
    with pytest.raises(ModelError, match=r"FastCrossEncoder\.get_peft_model"):
        CrossEncoderTrainer(model, train_dataset=pairs)


def test_the_names_are_sentence_transformers_own() -> None:
    assert burnish.CrossEncoderTrainer is CrossEncoderTrainer
    assert burnish.CrossEncoderTrainingArguments is CrossEncoderTrainingArguments
    assert issubclass(CrossEncoderTrainer, sentence_transformers.cross_encoder.CrossEncoderTrainer)
    assert issubclass(CrossEncoderTrainingArguments, StockArguments)
    assert CrossEncoderTrainer.training_args_class is StockArguments
